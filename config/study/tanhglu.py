# One activation, tanh.
activations = ("tanh",)
