"""Runs side by side: grouped over seeds, ranked by validation, in the terminal and on a page."""
