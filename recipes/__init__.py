"""Recipes as YAML, and the facts that the built-in tasks are made from. Data only."""
