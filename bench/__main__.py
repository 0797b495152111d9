"""The command line: python -m bench attention|cpu|features|derivatives|models|ptx|compiled|gpu.

Exit codes: 0 all results correct, 1 one is wrong, 2 wrong usage. PyTorch and Triton are imported by the commands
themselves, so that --help and wrong usage answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from .architectures import ARCHITECTURES
from .gpu import command as gpu_command
from .usage import UsageError


def parse_shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(x) for x in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError("takes BATCH,HEADS,SEQ,HEAD_DIM, each at least 1")
    return sizes


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; the options of `ptx` only if it is the command."""
    top = argparse.ArgumentParser(prog="python -m bench", description="Measure flashattn against PyTorch.")
    commands = top.add_subparsers(dest="command", required=True)
    add_attention(commands)
    add_cpu(commands)
    add_features(commands)
    add_derivatives(commands)
    add_models(commands)
    if command == "ptx":
        from .ptx import command as ptx_command

        ptx_command.add_parser(commands)
    else:
        commands.add_parser("ptx", help="compiled kernels executed and counted without a GPU")
    add_compiled(commands)
    gpu_command.add_parser(commands)
    return top


# ------------------------------------------------------------------------------------------------ options


def add_attention(commands) -> None:
    command = commands.add_parser(
        "attention",
        help="attention against scaled_dot_product_attention",
        description="Error against float64, time, and the ratio to PyTorch's scaled_dot_product_attention, measured in "
        "pairs in the same run. Without --shape: a list of common shapes.",
    )
    command.add_argument("--quick", action="store_true", help="ten small cases, in under half a minute")
    command.add_argument("--shape", type=parse_shape, metavar="B,H,S,D", help="one case: batch, heads, seq, head_dim")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of that case")
    command.add_argument("--causal", action="store_true", help="that case causal")
    command.add_argument("--backward", action="store_true", help="that case's backward")
    command.add_argument("--backend", choices=["triton", "cpu", "reference"], help="force one; default: the best here")
    command.add_argument("--device", help="default cuda if PyTorch finds a GPU, else cpu")
    command.add_argument("--seconds", type=float, default=None, help="time for each case (default 0.5 quick, else 2)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object a line")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also plot ratio against length (png, svg, pdf)")
    command.set_defaults(run=run_attention)


def add_cpu(commands) -> None:
    command = commands.add_parser(
        "cpu",
        help="the CPU engine: attention, decoding and norms against PyTorch and the machine's ceilings",
        description="Time, ratio to PyTorch measured in pairs in the same run, percentage of the machine's peak, and "
        "the error against float64. About three minutes for all cases; arguments filter them by substring: "
        "python -m bench cpu causal bfloat16",
    )
    command.add_argument("words", nargs="*", help="only cases whose name and dtype contain all of these")
    command.add_argument("--seconds", type=float, default=2.0, help="time for each case (default %(default)s)")
    command.add_argument("--list", action="store_true", help="print the names of the cases and exit")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object a line")
    command.set_defaults(run=run_cpu)


def add_features(commands) -> None:
    command = commands.add_parser(
        "features",
        help="the cost of each feature of attention relative to a call without features",
        description="A call with one feature against a call without any on the same tiles, forward and backward, in "
        "pairs in the same run, with the error against float64. Under a minute for both dtypes.",
    )
    command.add_argument(
        "--shape", type=parse_shape, default=(1, 8, 1024, 64), metavar="B,H,S,D", help="default 1,8,1024,64"
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default float32 and bfloat16")
    command.add_argument("--seconds", type=float, default=0.5, help="time for each pair (default %(default)s)")
    command.set_defaults(run=run_features)


def add_derivatives(commands) -> None:
    command = commands.add_parser(
        "derivatives",
        help="the cost of forward mode, second derivatives and vmap, on the CPU",
        description="torch.func.jvp against the forward pass and against that of PyTorch's math, the second derivative "
        "against the first backward pass, vmap against a loop, in pairs in the same run, with the error against "
        "float64; and the memory of 32,768 tokens. Two minutes for both dtypes.",
    )
    command.add_argument(
        "--shape", type=parse_shape, default=(1, 8, 2048, 64), metavar="B,H,S,D", help="default 1,8,2048,64"
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default float32 and bfloat16")
    command.add_argument("--seconds", type=float, default=3.0, help="time for each pair (default %(default)s)")
    command.set_defaults(run=run_derivatives)


def add_models(commands) -> None:
    command = commands.add_parser(
        "models",
        help="whole models against transformers: generation, embeddings, training, continuous batching",
        description="SmolLM2, MiniLM and a small GPT-2 against transformers on the same weights, in pairs in the same "
        "run, with their results compared. Two minutes for all cases; arguments filter them by substring: "
        "python -m bench models MiniLM",
    )
    command.add_argument("words", nargs="*", help="only cases whose name contains all of these")
    command.add_argument("--seconds", type=float, default=8.0, help="time for each case (default %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object a line")
    command.set_defaults(run=run_models)


def add_compiled(commands) -> None:
    command = commands.add_parser(
        "compiled",
        help="the machine code of each kernel, compiled ahead of time for nine architectures",
        description="Registers, spills, shared memory and occupancy of each kernel and, for NVIDIA, the machine code "
        "of each loop with tensor instructions: its length, its instruction mix, and the issue slots of its other "
        "instructions per tensor FLOP. For the project's kernels (attention, norm, decode; default all three) or any "
        "other: python -m bench compiled mine.py:add_kernel 'x=*fp32' 'out=*fp32' n=1000 BLOCK=256",
    )
    command.add_argument(
        "what", nargs="*", help="attention, norm, decode, or file.py:function and its arguments name=value"
    )
    command.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only these; may be repeated")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write one JSON object a line")
    command.add_argument(
        "--limits", action="store_true", help="only attention's loops over full tiles, against their limits"
    )
    command.set_defaults(run=run_compiled)


# ------------------------------------------------------------------------------------------------ commands


def run_attention(args) -> int:
    import flashattn

    from . import attention

    if args.shape:
        cases = [attention.Case(*args.shape, args.dtype, args.causal, args.backward)]
    else:
        cases = attention.QUICK if args.quick else attention.FULL
    seconds = args.seconds if args.seconds is not None else 0.5 if args.quick else 2.0
    device = find_device(args.device)
    with flashattn.use_backend(args.backend) if args.backend else contextlib.nullcontext():
        results = attention.print_results(attention.run(case, device, seconds) for case in cases)
    if args.json:
        attention.write_json(results, args.json)
    if args.plot:
        attention.write_plot(results, args.plot)
    return 0 if all(r.correct for r in results) else 1


def find_device(name: str | None):
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise UsageError(f"--device must be an available device, got {name!r}: {str(error).splitlines()[0]}") from None
    return device


def run_cpu(args) -> int:
    import flashattn

    from . import cpu, cpu_figures, cpu_report
    from .measure import keep_memory_warm

    cases = cpu.select(args.words)
    if not cases:
        raise UsageError(f"no case contains {' and '.join(args.words)}; --list names them")
    if args.list:
        print("\n".join(f"{case.name}, {case.dtype}" for case in cases))
        return 0
    if flashattn.backends.cpu.missing_reason:
        print(f"error: {flashattn.backends.cpu.missing_reason}", file=sys.stderr)
        return 1
    keep_memory_warm()
    ceilings = cpu.measure_ceilings()
    with flashattn.use_backend("cpu"):
        results = cpu_report.print_results((cpu.run(case, ceilings, args.seconds) for case in cases), ceilings)
        figures = [] if args.words else cpu_report.print_figures(cpu_figures.measure_figures(args.seconds))
    if args.json:
        cpu_report.write_json(results, figures, args.json)
    return 0 if all(r.correct for r in results) else 1


def run_features(args) -> int:
    import torch

    from . import features
    from .measure import keep_memory_warm

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


def run_derivatives(args) -> int:
    from . import derivatives
    from .measure import keep_memory_warm

    dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
    keep_memory_warm()
    costs = derivatives.print_costs(derivatives.run(args.shape, dtypes, args.seconds), args.shape)
    return 0 if all(c.correct for c in costs) else 1


def run_models(args) -> int:
    from . import models
    from .environment import describe_environment

    if not any(all(word in case.name for word in args.words) for case in models.CASES):
        raise UsageError(f"no case contains {' and '.join(args.words)}")
    rows = models.print_rows(models.measure(args.words, args.seconds))
    if args.json:
        machine = describe_environment()
        lines = [json.dumps(row._asdict() | {"times": row.times._asdict(), "machine": machine}) for row in rows]
        args.json.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if all(row.same for row in rows) else 1


def run_compiled(args) -> int:
    if args.limits:
        from . import limits

        return limits.run()
    from . import compiled_report

    return compiled_report.run(args.what, args.arch or ARCHITECTURES, args.json)


def main() -> int:
    args = make_parser(sys.argv[1] if len(sys.argv) > 1 else None).parse_args()
    try:
        if args.command == "ptx":
            from .ptx import command as ptx_command

            return ptx_command.run(args)
        return args.run(args)
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
