"""Converted models in programs that answer requests."""
