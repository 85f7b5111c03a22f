"""The model: tasks, what they share, and the densities p(D | theta), p(theta | phi, sigma)."""
