# PolyGLU trained without Gumbel noise.
# Override files combine: python train.py config/tiny.py config/study/no_noise.py
gumbel = False
