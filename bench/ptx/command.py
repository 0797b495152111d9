"""python -m bench ptx: runs a kernel on the PTX machine, checks its result and prints its counts."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch

import flashattn

from .. import launches, named_kernel
from ..table import make_console
from ..usage import UsageError
from . import float32_errors, report
from .driver import ARCHITECTURES, device
from .norm_bytes import count_norm_bytes

SHAPES = {
    "attention": (1, 2, 256, 64), "norm": (64, 1024), "decode": (2, 4, 300, 64), "precision": (1, 2, 200, 64),
}  # fmt: skip
DIMENSIONS = {"attention": "BATCH,HEADS,SEQ,HEAD_DIM", "norm": "ROWS,COLS", "decode": "BATCH,HEADS,CACHED,HEAD_DIM",
              "precision": "BATCH,HEADS,SEQ,HEAD_DIM"}  # fmt: skip
DESCRIPTION = """\
Compiles a kernel for a GPU, executes the PTX on this machine's CPU, compares the result with float64 and prints what a
profiler would count: instructions by pipe, global sectors, shared wavefronts and bank conflicts, tensor FLOPs, and
lower bounds on the time on that GPU. It models results, memory ordering and counts; no time, no caches. A kernel that
reads outside of a tensor, races, or reads a copy before its wait stops with the block, thread, PTX line and Python
line.

  python -m bench ptx attention --arch sm_90 --shape 1,2,256,64 --backward --lines
  python -m bench ptx precision --arch sm_90 (errors of float32 by torch.set_float32_matmul_precision)
  python -m bench ptx mine.py:add_kernel x=float32[1000] out=float32[1000] n=1000 BLOCK=256 --grid 4
  python -m bench ptx mine.py:main          (a plain function without arguments that launches kernels itself)
"""


def add_parser(commands) -> None:
    command = commands.add_parser(
        "ptx", help="execute compiled kernels and count, without a GPU", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("what", help="attention, norm, decode, precision or file.py:function")
    command.add_argument("arguments", nargs="*", metavar="name=value", help=named_kernel.HELP)
    command.add_argument(
        "--arch", choices=ARCHITECTURES, default="sm_80", help="what to compile for (default %(default)s)"
    )
    shapes = "; ".join(f"{name} {DIMENSIONS[name]} ({','.join(map(str, SHAPES[name]))})" for name in SHAPES)
    command.add_argument("--shape", metavar="N,N,…", help=shapes)
    command.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="default %(default)s"
    )
    command.add_argument("--causal", action="store_true", help="of attention")
    command.add_argument("--backward", action="store_true", help="of attention and norm: the gradients too")
    command.add_argument("--rms", action="store_true", help="of norm: RMSNorm")
    command.add_argument("--grid", default="1", metavar="N,N,N", help="of a kernel file.py:function (default 1)")
    command.add_argument("--lines", action="store_true", help="the Python source with counts beside each line")
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="also write one JSON object for each launch, a line each"
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="also write a page with all of it")


def parse_numbers(text: str, what: str) -> tuple[int, ...]:
    try:
        found = tuple(int(x) for x in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"{what} takes positive integers separated by commas, got {text!r}")
    return found


def parse_shape(args) -> tuple[int, ...]:
    if args.arguments:
        raise UsageError(f"{args.what} takes options, not arguments: got {args.arguments[0]!r}")
    shape = parse_numbers(args.shape, "--shape") if args.shape else SHAPES[args.what]
    if len(shape) != len(SHAPES[args.what]):
        raise UsageError(f"--shape of {args.what} takes {DIMENSIONS[args.what]}, got {args.shape!r}")
    if args.what in ("decode", "precision") and shape[2] < 2:
        raise UsageError(f"--shape of {args.what} takes at least 2 cached tokens")
    return shape


def make_work(args) -> launches.Work | None:
    """The call of this project that `args` name; None for a kernel in a file."""
    if args.what not in SHAPES:
        return None
    shape = parse_shape(args)
    dtype = getattr(torch, args.dtype)
    if args.what == "attention":
        return launches.make_attention(shape, dtype, args.causal, args.backward)
    if args.what == "norm":
        return launches.make_norm(shape, dtype, args.backward, args.rms)
    return launches.make_decode(shape, dtype)


def make_call(args):
    """The launch of a kernel in a file."""
    if ":" not in args.what:
        raise UsageError(f"takes {', '.join(SHAPES)} or file.py:function, got {args.what!r}")
    return named_kernel.make_launch(args.what, args.arguments, parse_numbers(args.grid, "--grid"))


def run(args) -> int:
    """Returns 0 if the result is right, or not checked, and 1 if it is wrong."""
    console = make_console(200)
    if args.what == "precision":
        return float32_errors.run(parse_shape(args), args.arch, console)
    work = make_work(args)
    call = work.run if work else make_call(args)
    start = time.perf_counter()
    with console.status(f"running {args.what} on {args.arch}"), device(args.arch) as gpu:
        if work:
            with flashattn.use_backend("triton"):
                results = call()
        else:
            call()
    if not gpu.launches:
        raise RuntimeError(f"{args.what} launched no kernel")
    seconds = time.perf_counter() - start
    launched = f"{len(gpu.launches)} launch{'es' if len(gpu.launches) > 1 else ''}"
    console.print(f"{work.text if work else args.what}: {launched} in {seconds:.1f} s\n")
    gpu.show(args.lines)
    if args.what == "norm":
        for name, found in count_norm_bytes(gpu.launches).items():
            console.print(f"{name}: {found.text}")
    correct = print_errors(console, work, results) if work else True
    if args.json:
        args.json.write_text(
            "".join(json.dumps(report.make_record(launch)) + "\n" for launch in gpu.launches), encoding="utf-8"
        )
    if args.html:
        command = f"python -m bench {shlex.join(sys.argv[1:])}"
        args.html.write_text(report.render_page(gpu.launches, command), encoding="utf-8")
    return 0 if correct else 1


def print_errors(console, work: launches.Work, results: dict) -> bool:
    """Prints the largest errors against float64; returns whether all are at most twice that of PyTorch's operations in
    the same dtype plus one unit in the last place."""
    with flashattn.use_backend("reference"):
        truth, theirs = work.truth(), work.run()
    correct = True
    for name, x in results.items():
        error, their_error = ((y.double() - truth[name]).abs().max().item() for y in (x, theirs[name]))
        right = error <= 2 * their_error + torch.finfo(x.dtype).eps * truth[name].abs().max().item()
        correct &= right
        console.print(
            f"{name}: largest error against float64 {error:.1e}, of PyTorch's operations {their_error:.1e}"
            + ("" if right else "  WRONG")
        )
    return correct
