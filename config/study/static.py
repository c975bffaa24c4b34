# PolyGLU without a router: alpha only.
# Override files combine: python train.py config/tiny.py config/study/static.py
router_hidden = 0
