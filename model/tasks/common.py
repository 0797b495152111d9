"""Shared by the tasks: the command line, settings, a small Llama."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch

from ..config import Config
from ..encoder_decoder import Model
from ..io.tokenizer import Tokenizer
from ..layers import initialise
from ..training.batches import Batch
from ..training.runs import Run
from ..training.train import Training, train
from ..transformer import Transformer


def make_parser(description: str, steps: int) -> argparse.ArgumentParser:
    """The options of every task."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--out", metavar="DIRECTORY", help="for checkpoints, log and plots; a run in it is resumed")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def run_command(parser: argparse.ArgumentParser, run: Callable[..., dict], show: Callable[[dict], None]) -> int:
    """Run a task with the options of its command line. Exit codes: 0 done, 1 an error, 130 interrupted."""
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    try:
        result = run(**options)
    except KeyboardInterrupt:
        print("\ninterrupted; with --out the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, ensure_ascii=False)) if as_json else show(result)
    return 0


def train_task(
    model: Model,
    batch: Callable[[int], Batch],
    settings: Training,
    out: str | None,
    evaluate: Callable[[Model], dict[str, float]] | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[dict]:
    """`train`, in a run if a directory is given."""
    return train(model, batch, settings, Run(out) if out else None, evaluate, tokenizer)


def count_training_minutes(log: list[dict]) -> float:
    """The duration of a log's steps, without evaluations."""
    return sum(entry.get("seconds", 0) for entry in log) / 60


def make_fine_tuning_settings(steps: int, learning_rate: float, every: int, seed: int) -> Training:
    """The settings of BERT's fine-tuning, with an evaluation and a checkpoint every so many steps. Devlin et al.,
    "BERT" (2018), appendix A.3."""
    return Training(
        steps, learning_rate, warmup=steps // 10, weight_decay=0.01, betas=(0.9, 0.999), evaluate_every=every,
        save_every=every, seed=seed,
    )  # fmt: skip


def make_small_llama(vocab_size: int, layers: int, width: int, context: int, seed: int) -> Transformer:
    """An untrained Llama with heads of 64."""
    if width % 64:
        raise ValueError(f"width must be a multiple of the heads' 64, got {width}")
    config = Config(
        "llama", vocab_size=vocab_size, width=width, layers=layers, heads=width // 64, kv_heads=width // 64,
        head_dim=64, ffn_width=width * 8 // 3 // 32 * 32, context=context, causal=True, norm="rms", norm_eps=1e-5,
        norm_first=True, activation="silu", gated=True, positions="rope", bias=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Transformer(config)
    initialise(model, layers)
    return model
