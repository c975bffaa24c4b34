# Static preferences only: alpha, no router.
router_hidden = 0
