# Input-independent mixtures, close to the learnable activations (LA) of MoA's paper (arXiv 2605.26647): alpha alone,
# without a router, noise or annealing. Ours are convex, by a softmax, and differ from neuron to neuron.
# Override files combine: python train.py config/tiny.py config/study/la.py
router_hidden = 0
gumbel = False
tau_end = 1.0
