"""Almost-linear RNNs: dynamical systems as few affine maps, learnt from their trajectories (arXiv 2410.14240)."""
