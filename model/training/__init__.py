"""Training: the loop, its batches, its directory, several processes."""
