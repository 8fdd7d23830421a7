"""Evaluation: sets of pictures, features of them in a store, figures with protocol and interval."""
