"""The private gradient, what it costs, where that is recorded, and what may leave."""
