"""Find, read, check and cache the files of data sets."""
