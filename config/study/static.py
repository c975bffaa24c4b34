# Static preferences alone: alpha, and no router.
router_hidden = 0
