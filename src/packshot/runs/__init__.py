"""A run on disk: its folder, files written whole, log, progress, tracking and licences."""
