"""The coordinator: rounds, merging, alignment, evaluation, release."""
