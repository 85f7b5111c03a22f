"""Which modules to keep task-specific: the losses of sets of modules, measured on tasks."""
