# Do neurons of a centred layer differ more if alpha learns 10 times as fast?
# Override files combine: python train.py config/tiny.py config/study/centred_alpha_10.py
router_context = "token"
router_centred = True
alpha_lr = 10.0
