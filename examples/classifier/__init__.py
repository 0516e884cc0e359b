"""Example: a classifier, from training to an artifact."""
