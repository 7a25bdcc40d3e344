"""Speed: providers x shapes x row counts, checked first, timed side by side."""
