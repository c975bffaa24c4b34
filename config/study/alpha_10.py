# Do neurons differ more if alpha learns 10 times as fast? PolyGLU without centring.
# Override files combine: python train.py config/tiny.py config/study/alpha_10.py
alpha_lr = 10.0
