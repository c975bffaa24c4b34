# Is centring enough with the prefix mean? Its router minus its own mean over the document so far.
# Override files combine: python train.py config/tiny.py config/study/prefix_centred.py
router_context = "prefix"
router_centred = True
