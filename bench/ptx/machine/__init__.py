"""Executes a program over a grid and counts what it does."""
