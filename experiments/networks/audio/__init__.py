"""Networks over raw audio."""
