# What the neurons' own preferences are worth: alpha, no router.
# Override files combine: python train.py config/tiny.py config/study/static.py
router_hidden = 0
