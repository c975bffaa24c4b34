# A small PolyGLU that answers arithmetic, in minutes on two CPU cores.
# python train.py config/tiny.py && python sft.py config/tiny_sft.py

data_dir = "data/tiny_sft"
out_dir = "out/tiny_sft"
init_from = "out/tiny"

# run: 2.8M tokens
max_steps = 2700
batch_size = 4
micro_batch_size = 4
lr = 1e-3
weight_decay = 0.0  # no row is seen twice
warmup_steps = 50

eval_interval = 900
eval_tokens = 32_768
save_interval = 450
sample_tokens = 120  # a worked answer
