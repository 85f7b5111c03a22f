"""Store, load and serve the adapted parameters of many tasks."""
