"""The results of a run for people: a table on the terminal and a self-contained page."""
