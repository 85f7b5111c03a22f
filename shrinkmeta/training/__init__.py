"""The training loop with its updates, callbacks, checkpoints and early stops."""
