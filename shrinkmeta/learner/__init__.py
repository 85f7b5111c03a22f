"""The learner: its construction, its functions, and one step of phi and sigma."""
