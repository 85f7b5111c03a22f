"""Pictures of a fitted mixed model."""
