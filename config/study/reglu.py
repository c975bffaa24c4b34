# ReGLU: one activation, relu.
activations = ("relu",)
