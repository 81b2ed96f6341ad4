"""Merging: how many hospitals' adapters become one. Pure mathematics on adapters, one idea a file."""
