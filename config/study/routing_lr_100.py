# The routing parameters train with 100 times the learning rate.
routing_lr = 100.0
