"""The CPU engine. Its import registers the operators of `csrc/bindings*.cpp` and gives nothing else."""  # noqa: N999
