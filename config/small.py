# A PolyGLU of GPT-2's size, 124M parameters, on one consumer card of 24 GB.
# python prepare_data.py pretrain --tokenizer=gpt2 --max_tokens=1e9 && python train.py config/small.py
# On your own text: python prepare_data.py text --source='*.txt' --tokenizer=gpt2
#                   python train.py config/small.py --data_dir=data/text --max_steps=500
#
# The first command takes 1B tokens of each domain, in equal shares. 5,000 steps are 2.6B tokens, 21 per parameter.
# Estimated, not measured (docs/performance.md): 8 hours on an RTX 4090, 14 on an RTX 3090; 15 GB of memory.

data_dir = "data/pretrain"
out_dir = "out/small"

# model: 123,961,824 parameters
tokenizer = "gpt2"
vocab_size = 50_259
block_size = 1024
n_layer = 12
n_head = 12
n_kv_head = 6
n_embd = 768
d_ff = 2304

# run: 0.5M tokens a step
max_steps = 5000
batch_size = 512
micro_batch_size = 32  # if out of memory, halve it; the steps stay the same
lr = 6e-4
warmup_steps = 500

eval_interval = 500
