"""Studies of solvers."""
