"""Where work runs: tasks in blocks, over the devices of a mesh, and the memory that takes."""
