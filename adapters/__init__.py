"""The adapter: base model, LoRA factors, low-rank algebra, files, and the plan beside it."""
