# PolychromaticLM: the paper's pretraining, 597M parameters on 10.24B tokens. One A100 80GB, or more under torchrun.
# python prepare_data.py pretrain && python train.py config/pretrain.py
# torchrun --nproc_per_node=8 train.py config/pretrain.py

data_dir = "data/pretrain"
out_dir = "out/pretrain"

# model: 28 layers, 1,380,960 of its parameters routing
tokenizer = "qwen3"
vocab_size = 151_669
block_size = 4096
n_layer = 28
n_head = 16
n_kv_head = 8
head_dim = 64
n_embd = 1024
d_ff = 4096
activations = ("relu", "tanh", "silu", "gelu")
router_hidden = 32
router_context = "prefix"
rope_theta = 10_000.0

# data: math-heavy, and more so over the last fifth
mixture = {"math": 0.70, "stem": 0.25, "code": 0.05}
mixture_end = {"math": 0.85, "stem": 0.10, "code": 0.05}
anneal_start = 0.8

# run: 19,531 steps of 128 x 4,096 = 524,288 tokens
max_steps = 19_531
batch_size = 128
micro_batch_size = 8  # 16 accumulated on one GPU
lr = 1e-4
warmup_steps = 2000
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1.0
tau_start = 1.0
tau_end = 0.1

eval_interval = 1000
eval_tokens = 1_048_576
save_interval = 500
