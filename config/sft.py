# The paper's fine-tuning: PolychromaticLM on conversations about math. One A100 80GB, or more under torchrun.
# python prepare_data.py sft && python sft.py config/sft.py
#
# The recipe is the defaults: those of sft.SFTConfig, and for the rest train.TrainConfig. Nothing differs.
