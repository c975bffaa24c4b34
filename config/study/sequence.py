# What a leak is worth: the router reads the mean of the whole row, later tokens included, as in the paper's code.
# Override files combine: python train.py config/tiny.py config/study/sequence.py
router_context = "sequence"
