"""What each task owns: the adapted parameters of many tasks, stored, read and served together."""
