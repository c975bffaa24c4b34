# config/tiny.py made larger: width 320 and 6 layers, on the same corpus. 20 minutes on one CPU core.
# python train.py config/tiny_wide.py

data_dir = "data/tiny"
out_dir = "out/tiny_wide"

# model: 6.8M parameters
tokenizer = "bytes"
vocab_size = 259
block_size = 256
n_layer = 6
n_head = 6
n_kv_head = 3
head_dim = 32
n_embd = 320
d_ff = 960

# run: 1.6M tokens
max_steps = 1600
batch_size = 4
micro_batch_size = 4
lr = 1e-3
warmup_steps = 100

eval_interval = 400
eval_tokens = 32_768
save_interval = 400
