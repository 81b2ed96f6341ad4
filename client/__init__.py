"""A hospital: reads its notes, trains under differential privacy, keeps the ledger, guards the way out."""
