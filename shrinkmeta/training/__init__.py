"""The training loop: updates, checkpoints, callbacks, and what ends a run."""
