"""The files of sentence-transformers that say how a text becomes a vector."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import Pooling
from ..families.fields import look_up, require
from ..pooling import POOLINGS

KINDS = ("Transformer", "Pooling", "Normalize", "Dropout")  # of modules; Dropout does nothing at inference
# The modes' names in older versions.
OLD = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens"}


def find_old_name(mode: str) -> str:
    return f"pooling_mode_{OLD.get(mode, mode)}"


def read(directory: Path) -> Pooling | None:
    """None if there is no modules.json.

    Raises:
        ValueError: naming a module or a pooling that is not supported.
    """
    if not (directory / "modules.json").exists():
        return None
    folders = {}
    for module in read_json(directory / "modules.json"):
        kind = module["type"].rpartition(".")[2]
        if kind not in KINDS:
            known = f"modules.json: modules must be {', '.join(KINDS)}, got {kind}"
            raise ValueError(f"{known}; without modules.json the model loads alone")
        folders[kind] = directory / module["path"]
    if "Pooling" not in folders:
        raise ValueError("modules.json must have a Pooling, got none")
    hf = read_json(folders["Pooling"] / "config.json")
    require(hf, include_prompt=True)
    text = next(iter(sorted(folders["Transformer"].glob("sentence_*_config.json"))), None)
    text = {} if text is None else read_json(text)
    return Pooling(
        modes=read_modes(hf),
        normalize="Normalize" in folders,
        max_seq_length=text.get("max_seq_length"),
        lower_case=bool(text.get("do_lower_case")),
        **read_prompts(directory / "config_sentence_transformers.json"),
    )


def read_prompts(file: Path) -> dict:
    hf = read_json(file) if file.exists() else {}
    prompts, name = hf.get("prompts") or {}, hf.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise ValueError(f"{file.name}: default_prompt_name must be one of {', '.join(prompts)}, got {name!r}")
    return dict(prompts=tuple(prompts.items()), default_prompt=name or "")


def read_modes(hf: dict) -> tuple[str, ...]:
    found = hf.get("pooling_mode") or [mode for mode in POOLINGS if hf.get(find_old_name(mode))] or ["mean"]
    modes = [found] if isinstance(found, str) else found
    for mode in modes:
        look_up({"pooling_mode": mode}, "pooling_mode", "mean", POOLINGS)
    return tuple(modes)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(pooling: Pooling, width: int, directory: Path) -> None:
    """The reverse of `read`."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if pooling.normalize else {})
    modules = [
        dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
        for i, (kind, path) in enumerate(kinds.items())
    ]
    modes: dict = {find_old_name(mode): mode in pooling.modes for mode in POOLINGS}  # all versions read these
    if read_modes(modes) != pooling.modes:  # concatenated in another order
        modes = dict(pooling_mode=pooling.modes)
    prompts = dict(prompts=dict(pooling.prompts), default_prompt_name=pooling.default_prompt or None)
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": dict(word_embedding_dimension=width) | modes,
        "sentence_bert_config.json": dict(max_seq_length=pooling.max_seq_length, do_lower_case=pooling.lower_case),
        "config_sentence_transformers.json": prompts,
    }
    for path in filter(None, kinds.values()):
        (directory / path).mkdir()
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
