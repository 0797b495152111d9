"""What the tasks share: their command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from ..checkpoints import Model
from ..runs import Run
from ..tokenizer import Tokenizer
from ..train import Batch, Training, train


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


def learn(
    model: Model,
    batch: Callable[[int], Batch],
    settings: Training,
    out: str | None,
    evaluate: Callable[[Model], dict[str, float]] | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[dict]:
    """`train`, in a run where a directory is given."""
    return train(model, batch, settings, Run(out) if out else None, evaluate, tokenizer)


def minutes(log: list[dict]) -> float:
    """That the steps of a log took, without evaluations."""
    return sum(entry.get("seconds", 0) for entry in log) / 60


def fine_tuning(steps: int, learning_rate: float, every: int, seed: int) -> Training:
    """As BERT is fine-tuned, evaluated and saved every so many steps. Devlin et al., "BERT" (2018), appendix A.3."""
    return Training(
        steps, learning_rate, warmup=steps // 10, weight_decay=0.01, betas=(0.9, 0.999), evaluate_every=every,
        save_every=every, seed=seed,
    )  # fmt: skip
