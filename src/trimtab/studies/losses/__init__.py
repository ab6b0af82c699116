"""Studies of the classification losses."""
