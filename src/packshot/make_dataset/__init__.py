"""Building a dataset from photographs or renders: sources, steps, quality, duplicates and the card."""
