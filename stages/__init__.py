"""Entries of the pipeline's stages: python -m stages.<name>, from the repository's root."""

import os

# OpenMP reads this when torch is loaded. By default its waiting threads spin: on two cores a training
# step takes 3 s beside another busy process instead of 0.22 s. Threads that sleep take 0.4 s there,
# and up to 15 % longer alone (python -m benchmarks.training).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
