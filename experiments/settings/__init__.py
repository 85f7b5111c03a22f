"""Settings: what is run, the flags that say it, and how they are checked."""
