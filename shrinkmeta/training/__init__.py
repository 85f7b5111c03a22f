"""The training loop: updates, callbacks, checkpoints, and early stops."""
