# Routing as in MoA (arXiv 2605.26647): the router reads the current token, without noise.
router_context = "token"
gumbel = False
