# Is a context needed? The router reads the current token only.
# Override files combine: python train.py config/tiny.py config/study/token.py
router_context = "token"
