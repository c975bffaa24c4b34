# Between the study and the two others: 1.2M parameters, 1,600 steps (1.6M tokens), three seeds. Its runs differ
# from those of the longer study in length alone, and from those of the larger one in size and learning rate.
# python -m extras.study config/study_middle.py

name = "middle"
variants = ("swiglu", "geglu", "prefix", "moa")
seeds = 3
max_steps = 1600
points = 5
cost_ratio = 1.0
check_lr = 0
eval_tokens = 65_536
out_dir = "out/study_middle"
