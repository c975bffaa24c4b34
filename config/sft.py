# The paper's fine-tuning: PolychromaticLM on conversations about math. One A100 80GB, or two under torchrun.
# With --micro_batch_size=1, up to 14: each process needs at least one of a step's 14 rows.
# python prepare_data.py sft && python sft.py config/sft.py
#
# All settings are the defaults of sft.SFTConfig and train.TrainConfig.
