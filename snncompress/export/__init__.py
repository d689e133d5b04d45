"""Networks for inference and for other tools."""
