"""The command line: python -m bench attention|cpu|features|models|ptx|compiled|gpu.

Exit codes: 0 all results correct, 1 one is wrong, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

import flashattn

from . import attention, compiled_report
from .attention import Case
from .gpu import command as gpu_command
from .measure import keep_memory_warm
from .named_kernel import UsageError
from .ptx import command as ptx_command
from .report import machine, print_table, write_json, write_plot


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(x) for x in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError("takes BATCH,HEADS,SEQ,HEAD_DIM, each at least 1")
    return sizes


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description="Measure flashattn against PyTorch.")
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "attention",
        help="attention against scaled_dot_product_attention",
        description="Error against float64, time, and the ratio to PyTorch's scaled_dot_product_attention, measured in "
        "pairs in the same run. Without --shape: a list of usual shapes.",
    )
    command.add_argument("--quick", action="store_true", help="ten small cases, in under half a minute")
    command.add_argument("--shape", type=shape, metavar="B,H,S,D", help="one case: batch, heads, seq, head_dim")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of that case")
    command.add_argument("--causal", action="store_true", help="that case causal")
    command.add_argument("--backward", action="store_true", help="that case's backward")
    command.add_argument("--backend", choices=["triton", "cpu", "reference"], help="force one; default: the best here")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    command.add_argument("--seconds", type=float, default=None, help="time for each case (default 0.5 quick, else 2)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object a line")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw ratio against length (png, svg, pdf)")
    add_cpu(commands)
    add_features(commands)
    add_models(commands)
    ptx_command.add_parser(commands)
    add_compiled(commands)
    gpu_command.add_parser(commands)
    return top


def add_cpu(commands) -> None:
    command = commands.add_parser(
        "cpu",
        help="the CPU engine: attention, decoding and norms against PyTorch and the machine's ceilings",
        description="Time, ratio to PyTorch measured in pairs in the same run, share of what the machine can do at "
        "most, and the error against float64. About three minutes for all cases; words choose some: "
        "python -m bench cpu causal bfloat16",
    )
    command.add_argument("words", nargs="*", help="only cases whose name and dtype hold all of these")
    command.add_argument("--seconds", type=float, default=2.0, help="time for each case (default %(default)s)")
    command.add_argument("--list", action="store_true", help="name the cases and stop")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object a line")


def add_features(commands) -> None:
    command = commands.add_parser(
        "features",
        help="what each feature of attention costs on top of the plain call",
        description="Each feature alone against the plain call of the same tiles, forward and backward, in pairs in "
        "the same run, with the error against float64. Under a minute for both dtypes.",
    )
    command.add_argument("--shape", type=shape, default=(1, 8, 1024, 64), metavar="B,H,S,D", help="default 1,8,1024,64")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default float32 and bfloat16")
    command.add_argument("--seconds", type=float, default=0.5, help="time for each pair (default %(default)s)")


def add_models(commands) -> None:
    command = commands.add_parser(
        "models",
        help="whole models against transformers: generation, embeddings, training, continuous batching",
        description="SmolLM2, MiniLM and a small GPT-2 against transformers on the same weights, in pairs in the same "
        "run, with their results compared. Two minutes for all cases; words choose some: python -m bench models MiniLM",
    )
    command.add_argument("words", nargs="*", help="only cases whose name holds all of these")
    command.add_argument("--seconds", type=float, default=8.0, help="time for each case (default %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object a line")


def add_compiled(commands) -> None:
    command = commands.add_parser(
        "compiled",
        help="what the compiler made of each kernel, ahead of time, on nine architectures",
        description="Registers, spills, shared memory and occupancy of each kernel and, for NVIDIA, the machine code "
        "of each loop with tensor instructions: its length, mix, and issue slots of other instructions for the tensor "
        "work. For the project's kernels (attention, norm, decode: all without a word) or any other: "
        "python -m bench compiled mine.py:add_kernel 'x=*fp32' 'out=*fp32' n=1000 BLOCK=256",
    )
    command.add_argument(
        "what", nargs="*", help="attention, norm, decode, or file.py:function and its arguments name=value"
    )
    command.add_argument(
        "--arch", action="append", choices=compiled_report.ARCHITECTURES, help="only these; may be repeated"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object a line")
    command.add_argument(
        "--limits", action="store_true", help="only the steady loops of attention against the limits set for them"
    )


def run_compiled(args) -> int:
    if args.limits:
        from . import limits

        return limits.run()
    return compiled_report.run(args.what, args.arch or compiled_report.ARCHITECTURES, args.json)


def run_features(args) -> int:
    from . import features

    dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
    keep_memory_warm()
    costs = features.print_costs(
        (
            features.measure(name, getattr(torch, dtype), args.shape, args.seconds)
            for dtype in dtypes
            for name in features.FEATURES
        ),
        args.shape,
    )
    return 0 if all(c.correct for c in costs) else 1


def run_models(args) -> int:
    from . import models

    if not any(all(word in case.name for word in args.words) for case in models.CASES):
        print(f"error: no case holds {' and '.join(args.words)}", file=sys.stderr)
        return 2
    rows = models.print_rows(models.measure(args.words, args.seconds))
    if args.json:
        lines = [json.dumps(row._asdict() | {"times": row.times._asdict(), "machine": machine()}) for row in rows]
        args.json.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if all(row.same for row in rows) else 1


def run_cpu(args) -> int:
    from . import cpu, cpu_report

    cases = cpu.select(args.words)
    if not cases:
        print(f"error: no case holds {' and '.join(args.words)}; --list names them", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{case.name}, {case.dtype}" for case in cases))
        return 0
    if flashattn.backends.cpu.missing:
        print(f"error: {flashattn.backends.cpu.missing}", file=sys.stderr)
        return 1
    keep_memory_warm()
    ceiling = cpu.ceilings()
    with flashattn.use_backend("cpu"):
        results = cpu_report.print_results((cpu.run(case, ceiling, args.seconds) for case in cases), ceiling)
        figures = [] if args.words else cpu_report.print_figures(cpu_report.figures(args.seconds))
    if args.json:
        cpu_report.write_json(results, figures, args.json)
    return 0 if all(r.correct for r in results) else 1


def find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise UsageError(f"--device takes a device that is here, got {name!r}: {str(error).splitlines()[0]}") from None
    return device


def run_attention(args) -> int:
    if args.shape:
        cases = [Case(*args.shape, args.dtype, args.causal, args.backward)]
    else:
        cases = attention.QUICK if args.quick else attention.FULL
    seconds = args.seconds if args.seconds is not None else 0.5 if args.quick else 2.0
    device = find_device(args.device)
    with flashattn.use_backend(args.backend) if args.backend else contextlib.nullcontext():
        results = print_table(attention.run(case, device, seconds) for case in cases)
    if args.json:
        write_json(results, args.json)
    if args.plot:
        write_plot(results, args.plot)
    return 0 if all(r.correct for r in results) else 1


COMMANDS = {
    "attention": run_attention, "cpu": run_cpu, "features": run_features, "ptx": ptx_command.run,
    "compiled": run_compiled, "models": run_models, "gpu": gpu_command.run,
}  # fmt: skip


def main() -> int:
    args = parser().parse_args()
    try:
        return COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
