"""Captioners: teaching one to describe scenes, scoring it, and letting it caption a dataset."""
