"""What each instruction does. Importing this package registers all of them (`frontend.program.builds`)."""

from . import (  # noqa: F401  (they register instructions)
    arithmetic,
    atomics,
    bulk_copy,
    control,
    cp_async,
    external_calls,
    ldmatrix,
    load_store,
    mbarriers,
    mma,
    moves,
    tensormap,
    warps,
    wgmma,
)
