"""A hospital: its notes, training under differential privacy, the ledger, and the way out."""
