"""What every stage shares: run folders, tracking, progress, files, errors."""
