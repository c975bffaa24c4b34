# Do the results change with size? The study at 6.8M parameters and 1,600 steps (1.6M tokens), read at five points.
# python -m extras.study config/study_larger.py
# Its control, the middle study, trains config/tiny.py for as many steps. Run by run, it differs from this study in size
# and learning rate alone, and from the longer one in length alone:
# python -m extras.study config/study_larger.py --name=middle --base=config/tiny.py --out_dir=out/study_middle

name = "larger"
base = "config/tiny_wide.py"
variants = ("swiglu", "geglu", "prefix", "moa")
seeds = 3
max_steps = 1600
points = 5
cost_ratio = 1.0
check_lr = 0
eval_tokens = 65_536
out_dir = "out/study_larger"
