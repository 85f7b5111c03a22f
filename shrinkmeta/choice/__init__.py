"""Choose the modules to keep task-specific, by the validation losses of sets of modules."""
