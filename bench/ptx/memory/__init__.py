"""Global and shared memory: the data, and the accesses that race detection compares."""
