# What the noise is worth: PolyGLU trained without it.
# Override files combine: python train.py config/tiny.py config/study/no_noise.py
gumbel = False
