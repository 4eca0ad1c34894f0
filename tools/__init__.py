"""Tools that build what the repository ships."""
