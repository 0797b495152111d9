"""The families. Each module has the same few names:

- `config(hf)`: a `Config` from the dictionary of a Hugging Face config.json, and `to_hf(config)`: the reverse -
`NAMES`: our parameter names to the checkpoint's; {i} is the layer - `IGNORED`: shell patterns of the names of tensors
that are not needed - `PREFIXES`: prefixes that the names in a checkpoint may have - `prepare(tensors, config)`, if
tensors are stored differently: convert them, and `restore(tensors, config)`: the reverse
"""

from . import albert, bert, gemma2, gpt2, gpt_neo, gpt_oss, llama, marian, mistral, qwen3, t5, whisper

FAMILIES = {
    "llama": llama, "bert": bert, "gpt2": gpt2, "mistral": mistral, "qwen3": qwen3, "gemma2": gemma2, "albert": albert,
    "gpt_neo": gpt_neo, "gpt_oss": gpt_oss, "t5": t5, "marian": marian, "whisper": whisper,
}  # fmt: skip
