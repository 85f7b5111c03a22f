"""The model: tasks, modules of parameters, the densities p(D | theta), p(theta | phi, sigma)."""
