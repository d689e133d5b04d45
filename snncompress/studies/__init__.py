"""Many measurements: what compression costs, by layer, threshold, set of blocks."""
