"""Evidence for the papers of area `robust`."""
