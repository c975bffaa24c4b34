# Routing parameters learn at 10 times the learning rate.
routing_lr = 10.0
