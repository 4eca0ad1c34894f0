"""Scores of finished generate.py runs: the product's identity, its extension, and what became of the scene."""
