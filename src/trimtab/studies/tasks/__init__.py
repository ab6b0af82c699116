"""The shared work that methods are compared on, one module per task."""
