# PolychromaticLM: the paper's pretraining, 597M parameters on 10.24B tokens. One A100 80GB, or more under torchrun.
# python prepare_data.py pretrain && python train.py config/pretrain.py
# torchrun --nproc_per_node=8 --shutdown_timeout=600 train.py config/pretrain.py
#
# The model and the run are the defaults of model.ModelConfig and train.TrainConfig. The data mixture:

mixture = {"math": 0.70, "stem": 0.25, "code": 0.05}
mixture_end = {"math": 0.85, "stem": 0.10, "code": 0.05}  # reached linearly over the last fifth of the run
