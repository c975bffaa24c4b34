# GEGLU: one activation, gelu.
activations = ("gelu",)
