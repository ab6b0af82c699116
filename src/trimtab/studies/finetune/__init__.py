"""Studies of fine-tuning methods."""
