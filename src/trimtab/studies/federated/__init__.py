"""Studies of the federated area."""
