# Does centring prevent the collapse? A token router minus its own mean over the document so far.
# Override files combine: python train.py config/tiny.py config/study/centred.py
router_context = "token"
router_centred = True
