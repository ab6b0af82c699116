"""Domain generalisation, domain adaptation, and test-time adaptation."""
