# How much does the leak help? The router reads the mean of the whole row, later tokens included (paper's code).
# Override files combine: python train.py config/tiny.py config/study/sequence.py
router_context = "sequence"
