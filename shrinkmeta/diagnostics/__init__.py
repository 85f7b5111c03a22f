"""Inspect a learner: check its gradient, summarise its modules, measure its loss on new tasks."""
