"""Drop-in replacements for calls of other libraries, with their signatures and semantics."""
