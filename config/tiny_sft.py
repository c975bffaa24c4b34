# A small PolyGLU that answers arithmetic, in minutes on two CPU cores.
# python prepare_data.py tiny_sft && python sft.py config/tiny_sft.py

data_dir = "data/tiny_sft"
out_dir = "out/tiny_sft"
init_from = "out/tiny"

# run: 1.3M tokens
max_steps = 1200
batch_size = 8
micro_batch_size = 8
lr = 2e-3
warmup_steps = 50

eval_interval = 300
eval_tokens = 32_768
save_interval = 200
compile = True
