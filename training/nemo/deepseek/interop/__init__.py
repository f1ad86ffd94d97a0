"""Wing: other programs' files and settings, read and written."""
