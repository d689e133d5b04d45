"""Text, files, bits, numbers: nothing of networks."""
