"""Machine unlearning for classifiers, graphs and generators, and an audit of its results."""
