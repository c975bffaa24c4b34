# A plain GLU of silu: what PolyGLU is compared with.
activations = ("silu",)
