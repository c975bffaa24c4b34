# Turn a trained SwiGLU model, such as a Qwen3, into a PolyGLU one. It starts as nearly the same function; then training
# decides which neurons leave silu. Name the model: python train.py config/upcycle.py --init_from=Qwen/Qwen3-0.6B-Base

out_dir = "out/upcycled"

# model: that of init_from, except for
activations = ("relu", "tanh", "silu", "gelu")
gumbel = False  # noise would move neurons away from silu at random
block_size = 4096

# run: 0.5B tokens; a low rate for the trained weights and a high one for the routing, which is new
max_steps = 1000
micro_batch_size = 4
lr = 2e-5
routing_lr = 100.0  # times lr
warmup_steps = 100
tau_start = 0.1  # at a higher temperature the activations would mix and the function would change

eval_interval = 100
save_interval = 100
