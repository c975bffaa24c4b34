# The router reads the current token only.
router_context = "token"
