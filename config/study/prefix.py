# PolyGLU as in model.py: the router reads the mean of the tokens so far.
router_context = "prefix"
