"""Deliberate practice: a learner trained on pictures that a generator draws while it learns."""
