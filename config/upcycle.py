# A trained SwiGLU model, such as a Qwen3, turned into a PolyGLU one: it starts as the same function, then training
# decides which neurons leave silu. Name the model: python train.py config/upcycle.py --init_from=Qwen/Qwen3-0.6B-Base

out_dir = "out/upcycled"
activations = ("relu", "tanh", "silu", "gelu")
router_hidden = 32
router_context = "prefix"
gumbel = False  # noise would move neurons away from silu before there is a reason to

# run: 0.5B tokens, a small rate for what is trained already and a large one for the routing, which is new
max_steps = 1000
batch_size = 128
micro_batch_size = 4
block_size = 4096
lr = 2e-5
routing_lr = 100.0
warmup_steps = 100
tau_start = 0.1  # low: at a high temperature the activations would be mixed, and the function another
tau_end = 0.1

eval_interval = 100
save_interval = 100
