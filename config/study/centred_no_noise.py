# Centred, trained without noise.
# Override files combine: python train.py config/tiny.py config/study/centred_no_noise.py
router_context = "token"
router_centred = True
gumbel = False
