"""Studies of diffusion methods."""
