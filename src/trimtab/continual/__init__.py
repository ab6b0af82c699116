"""Continual learning and category discovery over a stream of tasks."""
