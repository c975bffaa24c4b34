# PolyGLU trained without Gumbel noise.
gumbel = False
