"""Studies of metric-learning methods."""
