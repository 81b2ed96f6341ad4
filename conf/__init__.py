"""Configuration: Hydra YAML groups, their types and ranges. Imports nothing else of Wardround."""
