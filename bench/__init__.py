"""Measure and compare: `python -m bench --help`."""
