# Do the results change with training? The study at 4,000 steps (4.1M tokens), read at five points.
# python -m extras.study config/study_longer.py

name = "longer"
variants = ("swiglu", "geglu", "prefix", "moa", "la")
max_steps = 4000
points = 5
cost_ratio = 1.28  # from the runs' logs: compiled, with one thread, two at a time
check_lr = 0
eval_tokens = 65_536
out_dir = "out/study_longer"
