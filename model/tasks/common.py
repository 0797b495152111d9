"""What the tasks share: their command line, batches out of examples, tables."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..train import Batch


def arguments(description: str, steps: int) -> argparse.ArgumentParser:
    """The options of every task."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--out", metavar="DIRECTORY", help="for checkpoints, log and plots; goes on from what is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def command(parser: argparse.ArgumentParser, run: Callable[..., dict], show: Callable[[dict], None]) -> int:
    """Run a task as its command line says. Exit codes: 0 done, 1 an error, 130 interrupted."""
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    try:
        result = run(**options)
    except KeyboardInterrupt:
        print("\ninterrupted; with --out the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, ensure_ascii=False)) if as_json else show(result)
    return 0


def generator(seed: int, number: int) -> torch.Generator:
    """Random numbers that depend on these two alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def chosen(number: int, size: int, of: int, seed: int) -> list[int]:
    """The indices of the examples in a batch: every one of them once in each pass through all."""
    passes, first = divmod(number * size, of)
    order = torch.randperm(of, generator=generator(seed, passes)).tolist()
    if first + size > of:
        order += torch.randperm(of, generator=generator(seed, passes + 1)).tolist()
    return order[first : first + size]


def packed(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (total,) one sequence behind the other, and lengths (batch,)."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    return torch.tensor([token for tokens in sequences for token in tokens]), lengths


def windows(stream: Tensor, number: int, size: int, length: int, seed: int) -> Batch:
    """Pieces from anywhere of a long text; each token's target is the next."""
    firsts = torch.randint(0, len(stream) - length, (size, 1), generator=generator(seed, number))
    pieces = stream[firsts + torch.arange(length + 1)]
    return Batch(dict(tokens=pieces[:, :-1]), pieces[:, 1:])
