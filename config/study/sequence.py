# The router reads the mean of the whole row, later tokens too, as the paper's code does.
router_context = "sequence"
