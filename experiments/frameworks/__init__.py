"""One network, written in five ways, trained by the same learner from the same parameters."""
