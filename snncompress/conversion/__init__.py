"""CNNs that become spiking networks."""
