"""What a network is made of, and the edits that change it."""
