"""Sources of tasks for training: each epoch draws all tasks of a list, in a new random order."""
