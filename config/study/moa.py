# Close to MoA (arXiv 2605.26647), see docs/study.md: the router reads the current token, without noise.
# Override files combine: python train.py config/tiny.py config/study/moa.py
router_context = "token"
gumbel = False
