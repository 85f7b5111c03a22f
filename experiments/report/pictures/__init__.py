"""Pictures of what runs found."""
