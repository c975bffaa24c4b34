# The routing parameters train with 10 times the learning rate.
routing_lr = 10.0
