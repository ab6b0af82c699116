"""Metric learning, face-recognition heads, retrieval, and image-text alignment."""
