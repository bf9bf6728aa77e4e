"""Scores, the vectorised cascade, thresholds and votes, on saved logits: no torch."""
