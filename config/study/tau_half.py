# Does annealing cause the collapse? tau ends at 0.5 instead of 0.1.
# Override files combine: python train.py config/tiny.py config/study/tau_half.py
tau_end = 0.5
