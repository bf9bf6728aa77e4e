"""A server for a bundle: the Open Inference Protocol, batches, and answers in time or a refusal."""
