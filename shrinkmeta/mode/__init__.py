"""The posterior mode of one task: whitened coordinates, the task model and its optimisation."""
