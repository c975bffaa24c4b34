# PolyGLU with tau fixed at 1: how much the tau schedule alone lowers the entropy.
tau_end = 1.0
