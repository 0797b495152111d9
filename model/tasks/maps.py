"""Attention maps: a picture of every head's attention, and its entropy.

python -m model.tasks.maps --model minilm --out out/maps "The keys to the cabinet are on the table."
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ..inference.attention_maps import AttentionMaps, compute_attention_maps
from ..io.checkpoints import load

TEXT = "The keys to the cabinet that stood in the hall were not on the table, so she looked for them in her coat."


def draw(maps: AttentionMaps, words: list[str], file: Path) -> None:
    """A grid of heads, a row for each layer; a frame's colour is the head's entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, heads = maps.entropy.shape
    figure, axes = pyplot.subplots(layers, heads, figsize=(1.25 * heads + 1, 1.35 * layers + 0.6), squeeze=False)
    colours = matplotlib.colormaps["viridis"]
    low, high = maps.entropy.min().item(), maps.entropy.max().item()
    for layer in range(layers):
        for head in range(heads):
            axis, entropy = axes[layer, head], maps.entropy[layer, head].item()
            axis.imshow(maps.weights[layer, head].sqrt().numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"{entropy:.2f}", fontsize=7, pad=2)
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set(color=colours((entropy - low) / max(high - low, 1e-9)), linewidth=2.5)
        axes[layer, 0].set_ylabel(f"layer {layer}", fontsize=8)
    shown = " ".join(words[:30]) + (" …" if len(words) > 30 else "")
    figure.suptitle(f"queries down, keys across; number: entropy in nats\n{shown}", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def run(model: str, text: str, out: str | None) -> dict:
    loaded, tokenizer = load(model)
    tokens = tokenizer.encode(text)
    maps = compute_attention_maps(loaded, torch.tensor(tokens))
    words = [tokenizer.backend.id_to_token(token) for token in tokens]
    result = {"tokens": words, "entropy": maps.entropy.tolist()}
    if out:
        file = Path(out) / "attention.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(maps, words, file)
        result["picture"] = str(file)
    return result


def show(result: dict) -> None:
    rows = result["entropy"]
    print(f"entropy of each head's attention over {len(result['tokens'])} tokens, in nats\n")
    print("layer  " + " ".join(f"{f'h{head}':>5}" for head in range(len(rows[0]))))
    for layer, row in enumerate(rows):
        print(f"{layer:5}  " + " ".join(f"{value:5.2f}" for value in row))
    if "picture" in result:
        print(f"\npicture: {result['picture']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?", default=TEXT, help="default: a sentence of twenty words")
    parser.add_argument("--model", default="minilm", metavar="NAME", help="minilm, smollm2 or a directory")
    parser.add_argument("--out", metavar="DIRECTORY", help="for attention.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    try:
        result = run(args.model, args.text, args.out)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result)) if args.json else show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
