"""Merging without rounds: adapters or whole models that lie in folders, as a recipe says."""
