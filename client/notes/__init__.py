"""Notes: read from where a hospital keeps them, checked, and divided by patient."""
