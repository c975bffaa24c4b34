# A plain GLU of relu.
activations = ("relu",)
