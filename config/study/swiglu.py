# SwiGLU, the baseline: one activation, silu.
# Override files combine: python train.py config/tiny.py config/study/swiglu.py
activations = ("silu",)
