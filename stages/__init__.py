"""Entries of the pipeline's stages: python -m stages.<name>, from the repository's root."""

__all__: list[str] = []
