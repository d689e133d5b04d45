"""A network on its data."""
