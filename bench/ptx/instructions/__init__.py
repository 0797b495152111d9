"""The semantics of the instructions. Importing this package registers all of them (`frontend.program.implements`)."""

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
