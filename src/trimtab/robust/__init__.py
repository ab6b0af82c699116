"""Adversarial training, certified bounds, black-box defences and feature-level attacks."""
