"""Distances, objectives, orders, the fit loop and checkpoints."""
