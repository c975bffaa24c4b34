# A plain GLU of tanh.
activations = ("tanh",)
