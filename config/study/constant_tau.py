# Does annealing cause the collapse? tau stays at 1.
# Override files combine: python train.py config/tiny.py config/study/constant_tau.py
tau_end = 1.0
