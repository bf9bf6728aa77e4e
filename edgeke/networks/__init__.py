"""Backbones as ordered blocks, exits, and the multi-exit network."""
