"""The families. Each module has the same few names:

- `config(hf)`: a `Config` from the dictionary of a Hugging Face config.json, and `to_hf(config)`: the reverse
- `NAMES`: our parameter name to the checkpoint's; {i} stands for the layer
- `IGNORED`: patterns (as in a shell) of the names of tensors that carry nothing we need
- `PREFIXES`: what may stand in front of every name of a checkpoint
- `prepare(tensors, config)`, where needed: reshape what is stored differently, and `restore(tensors, config)`: back
"""

from . import albert, bert, gemma2, gpt2, gpt_neo, gpt_oss, llama, marian, mistral, qwen3, t5, whisper

FAMILIES = {
    "llama": llama, "bert": bert, "gpt2": gpt2, "mistral": mistral, "qwen3": qwen3, "gemma2": gemma2, "albert": albert,
    "gpt_neo": gpt_neo, "gpt_oss": gpt_oss, "t5": t5, "marian": marian, "whisper": whisper,
}  # fmt: skip
