# The router alone: alpha stays at 0, so all neurons of a layer choose alike, but for the noise.
frozen = ("alpha",)
