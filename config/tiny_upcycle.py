# Turn a small SwiGLU model into a PolyGLU one, in a minute: what config/upcycle.py does to a Qwen3.
# python train.py config/tiny.py --activations=silu --max_steps=200 --out_dir=out/silu
# python train.py config/tiny_upcycle.py && python eval.py --init_from=out/tiny_upcycled

init_from = "out/silu"
data_dir = "data/tiny"
out_dir = "out/tiny_upcycled"

# model: that of init_from, except for
activations = ("relu", "tanh", "silu", "gelu")
gumbel = False

# run: 51 thousand tokens
max_steps = 50
batch_size = 4
micro_batch_size = 4
lr = 5e-4
routing_lr = 300.0  # times lr; high, because there are only 50 steps
warmup_steps = 5
tau_start = 0.1

eval_interval = 50
eval_tokens = 32_768
save_interval = 50
