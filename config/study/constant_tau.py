# How much of the collapse is the tau schedule: tau stays at 1.
# Override files combine: python train.py config/tiny.py config/study/constant_tau.py
tau_end = 1.0
