# SwiGLU: one activation, silu. The baseline.
activations = ("silu",)
