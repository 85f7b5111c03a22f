"""What runs found: tables, pictures and one HTML page."""
