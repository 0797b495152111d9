"""Global and shared memory: their bytes, and who read and wrote them when."""
