# PolyGLU without alpha: it stays at 0, so the neurons of a layer differ only by the noise.
# Override files combine: python train.py config/tiny.py config/study/dynamic.py
frozen = ("alpha",)
