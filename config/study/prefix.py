# PolyGLU as model.py defines it: the router reads the mean of the document up to the current token.
router_context = "prefix"
