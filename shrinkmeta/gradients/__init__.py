"""What phi and sigma follow: one task at a time, and the sum over tasks."""
