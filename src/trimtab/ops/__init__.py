"""Primitives that several areas need, one small module each."""
