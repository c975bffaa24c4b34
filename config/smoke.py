# The whole pipeline in a minute on two CPU cores: corpus, training, evaluations, checkpoints, sample. It learns little.
# python train.py config/smoke.py

data_dir = "data/tiny"
out_dir = "out/smoke"

# model: 0.1M parameters
tokenizer = "bytes"
vocab_size = 259
block_size = 128
n_layer = 2
n_head = 4
n_kv_head = 2
head_dim = 16
n_embd = 64
d_ff = 192

# run: 20 thousand tokens
max_steps = 40
batch_size = 4
micro_batch_size = 4
lr = 5e-3
warmup_steps = 5

eval_interval = 20
eval_tokens = 4096
save_interval = 20
