"""Evidence for the papers of area `unlearning`."""
