# What the router alone is worth: alpha stays at 0, so neurons of a layer differ by the noise only.
# Override files combine: python train.py config/tiny.py config/study/dynamic.py
frozen = ("alpha",)
