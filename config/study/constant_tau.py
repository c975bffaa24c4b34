# PolyGLU whose temperature stays at 1: what the schedule of tau alone makes of the entropy.
tau_end = 1.0
