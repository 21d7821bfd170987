"""What a run shows: a summary in the terminal and a page."""
