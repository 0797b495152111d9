"""Checkpoints and tokenisers, read and written."""
