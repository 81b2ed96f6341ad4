"""Beyond rounds: experts merged by search, trade-offs against forgetting, other checkpoints."""
