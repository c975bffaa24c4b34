# A small PolyGLU on the embedded corpus, in minutes on two CPU cores.
# python train.py config/tiny.py

data_dir = "data/tiny"
out_dir = "out/tiny"

# model: 1.2M parameters
tokenizer = "bytes"
vocab_size = 259
block_size = 256
n_layer = 4
n_head = 4
n_kv_head = 2
head_dim = 32
n_embd = 160
d_ff = 480

# run: 1.6M tokens
max_steps = 1600
batch_size = 4
micro_batch_size = 4
lr = 2e-3
warmup_steps = 100

eval_interval = 400
eval_tokens = 32_768
save_interval = 400
