# PolyGLU as model.py defines it: the router reads the mean of the document up to the current token.
# Override files combine: python train.py config/tiny.py config/study/prefix.py
router_context = "prefix"
