"""``mode=check``: a few steps, pictures of what the network sees, and findings about the dataset."""
