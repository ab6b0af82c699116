"""Semi-supervised and self-supervised learning, clustering, and category discovery."""
