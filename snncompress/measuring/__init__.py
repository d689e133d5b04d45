"""Size, operations, energy, accuracy, gradients."""
