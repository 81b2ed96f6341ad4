"""The adapter: base model, LoRA factors, their low-rank algebra, files, and the plan that travels with it."""
