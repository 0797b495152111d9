class UsageError(ValueError):
    """A command line that makes no sense: exit code 2."""
