# A plain GLU of gelu.
activations = ("gelu",)
