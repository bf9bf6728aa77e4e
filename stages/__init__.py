"""Entries of the pipeline's stages: python -m stages.<name>, from the repository's root."""

import os

# OpenMP reads this when torch is loaded. By default its waiting threads spin: on two cores a
# training step then takes 4.5 s beside another busy process instead of 0.2 s. Threads that sleep
# take 0.4 s there, and little more than spinning ones alone (docs/training.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
