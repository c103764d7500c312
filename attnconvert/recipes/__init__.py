"""Recipes: the schema, the loader, and the shipped *.yaml. Nothing here imports torch; the stages' own settings live in `distill/config.py`."""
