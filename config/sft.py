# The paper's fine-tuning: PolychromaticLM on conversations about math. One A100 80GB, or more under torchrun.
# python prepare_data.py sft && python sft.py config/sft.py

data_dir = "data/sft"
out_dir = "out/sft"
init_from = "out/pretrain"

# run: 13,067 steps of 14 x 4,096 = 57,344 tokens, as many as the paper's 32 conversations a step
max_steps = 13_067
batch_size = 14
micro_batch_size = 7  # 2 accumulated on one GPU
lr = 2e-5
warmup_steps = 100
tau_start = 0.1
tau_end = 0.1

eval_interval = 1000
eval_tokens = 1_048_576
save_interval = 500
