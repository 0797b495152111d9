"""Surfaces of other libraries, with their signatures and semantics, on flashattn's backends."""
