# The paper's fine-tuning: PolychromaticLM on conversations about math. One A100 80GB, or more under torchrun.
# python prepare_data.py sft && python sft.py config/sft.py
#
# All settings are the defaults of sft.SFTConfig and train.TrainConfig.
