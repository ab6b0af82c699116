"""Inverse problems, image restoration and super-resolution, compositing, and image quality."""
