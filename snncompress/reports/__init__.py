"""A page that says what was done to a network, and what came of it."""
