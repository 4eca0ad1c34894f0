"""Images, masks and captions: from files to rows of a dataset, and from rows to the frames a model sees."""
