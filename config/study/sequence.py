# The router reads the mean of the whole row, later tokens included, as in the paper's code.
router_context = "sequence"
