"""Shipped recipes: YAML files read by `etude.core.recipe`; nothing to import."""
