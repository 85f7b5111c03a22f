"""Where the work runs: tasks in blocks, tasks over the devices of a mesh, and the memory needed."""
