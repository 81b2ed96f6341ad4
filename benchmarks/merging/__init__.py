"""Merging, measured: what it costs, and what it keeps of what hospitals learned."""
