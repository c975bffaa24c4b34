# The router reads this token alone.
router_context = "token"
