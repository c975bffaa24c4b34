# The router alone: alpha stays at 0, so all neurons of a layer get the same mixture, except for the noise.
frozen = ("alpha",)
