"""Evidence for the papers of area `domain`."""
