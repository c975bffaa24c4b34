# PolyGLU without Gumbel noise in training.
gumbel = False
