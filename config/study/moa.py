# As MoA routes: this token alone, without noise.
router_context = "token"
gumbel = False
