"""The fields of a config.json for rotary positions, both ways."""

from __future__ import annotations

from ..config import Config
from ..rope import DynamicScaling, LinearScaling, Llama3, LongRope, Scaling, Yarn, compute_yarn_amplitude

# rope_type -> our class, and our fields -> theirs. Fields with a default may be missing.
ORIGINAL = "original_max_position_embeddings"
TYPES = {
    "linear": (LinearScaling, dict(factor="factor")),
    "dynamic": (DynamicScaling, dict(factor="factor", original_context=ORIGINAL)),
    "llama3": (
        Llama3,
        dict(
            factor="factor", original_context=ORIGINAL, low_freq_factor="low_freq_factor",
            high_freq_factor="high_freq_factor",
        ),
    ),
    "longrope": (
        LongRope,
        dict(
            factor="factor", original_context=ORIGINAL, short_factors="short_factor", long_factors="long_factor",
            attention_factor="attention_factor",
        ),
    ),
    "yarn": (
        Yarn,
        dict(
            factor="factor", original_context=ORIGINAL, beta_fast="beta_fast", beta_slow="beta_slow",
            truncate="truncate", attention_factor="attention_factor",
        ),
    ),
}  # fmt: skip
ANY = {"rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL, "finetuned"}  # allowed beside them
YARN_ONLY = {"mscale", "mscale_all_dim"}


def read_rope(hf: dict, theta: float = 10000.0) -> dict:
    """Our fields `rope_theta`, `rope_scaling` and `context` from a config.json.

    theta: the default of a model whose config.json has none.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", *TYPES):
        raise ValueError(f"rope_type must be one of default, {', '.join(TYPES)}, got {kind!r}")
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"partial_rotary_factor must be 1, got {partial}")
    names = TYPES[kind][1] if kind in TYPES else {}
    unknown = set(rope) - ANY - set(names.values()) - (YARN_ONLY if kind == "yarn" else set())
    if unknown:
        raise ValueError(f"rope_parameters of the type {kind} must be {', '.join(names.values())}, got {min(unknown)}")
    context = hf["max_position_embeddings"]
    scaling = None if kind == "default" else read_scaling(kind, rope, hf)
    if isinstance(
        scaling, (LinearScaling, DynamicScaling)
    ):  # here max_position_embeddings is the context before scaling
        context = int(context * scaling.factor)
    elif isinstance(scaling, Yarn):  # here it may be either
        context = max(context, int(scaling.original_context * scaling.factor))
    theta = next((t for t in (rope.get("rope_theta"), hf.get("rope_theta")) if t is not None), theta)
    return dict(rope_theta=theta, rope_scaling=scaling, context=context)


def read_scaling(kind: str, rope: dict, hf: dict) -> Scaling:
    cls, names = TYPES[kind]
    values = {ours: rope[theirs] for ours, theirs in names.items() if rope.get(theirs) is not None}
    context = hf["max_position_embeddings"]
    if kind == "dynamic":
        values["original_context"] = context
    elif "original_context" in names:
        values["original_context"] = hf.get(ORIGINAL) or rope.get(ORIGINAL) or context
    if kind in ("yarn", "longrope") and "factor" not in values:
        values["factor"] = context / values["original_context"]
    for name in ("short_factors", "long_factors"):
        if name in values:
            values[name] = tuple(values[name])
    if kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim") and "attention_factor" not in values:
        above, below = (compute_yarn_amplitude(values["factor"], rope[name]) for name in ("mscale", "mscale_all_dim"))
        values["attention_factor"] = above / below
    missing = [names[ours] for ours in list_required_fields(cls) if ours not in values]
    if missing:
        raise ValueError(f"rope_parameters of the type {kind} must have {', '.join(missing)}")
    return cls(**values)


def list_required_fields(cls: type[Scaling]) -> list[str]:
    return [name for name in cls.__dataclass_fields__ if not hasattr(cls, name)]


def write_rope(config: Config) -> dict:
    """The reverse of `read_rope`."""
    scaling, rope, context = config.rope_scaling, dict(rope_type="default"), config.context
    if scaling is not None:
        kind = next(name for name, (cls, _) in TYPES.items() if isinstance(scaling, cls))
        values = {theirs: getattr(scaling, ours) for ours, theirs in TYPES[kind][1].items()}
        rope = dict(rope_type=kind) | {theirs: value for theirs, value in values.items() if value is not None}
    if isinstance(scaling, LinearScaling):
        context = round(context / scaling.factor)
    elif isinstance(scaling, DynamicScaling):
        context = rope.pop(ORIGINAL)
    rope["rope_theta"] = config.rope_theta
    return dict(rope_theta=config.rope_theta, rope_parameters=rope, max_position_embeddings=context)
