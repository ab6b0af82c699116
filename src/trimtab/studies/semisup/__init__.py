"""Evidence for the papers of area `semisup`."""
