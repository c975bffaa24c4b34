# GEGLU, the second baseline: one activation, gelu.
# Override files combine: python train.py config/tiny.py config/study/geglu.py
activations = ("gelu",)
