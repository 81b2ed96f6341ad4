"""Merging: how many adapters become one. Pure mathematics on adapters, one idea a file."""
