"""Evidence for the papers of area `compress`."""
