# PolychromaticLM: the paper's pretraining, 597M parameters on 10.24B tokens. One A100 80GB, or more under torchrun.
# python prepare_data.py pretrain && python train.py config/pretrain.py
# torchrun --nproc_per_node=8 train.py config/pretrain.py
#
# The recipe is the defaults: the model's in model.ModelConfig, the run's in train.TrainConfig. Nothing differs.
