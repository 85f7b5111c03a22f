"""States on disk: damaged checkpoints, and a state that is saved without `fit`."""
