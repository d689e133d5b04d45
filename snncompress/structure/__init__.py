"""What a network looks like: channels, blocks, timesteps."""
