"""Labelled images: sources, splits, the dataset file, batched augmentation."""
