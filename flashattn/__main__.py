"""python -m flashattn: versions, CPU features, which backends are usable here, and why the others are not."""

from __future__ import annotations

import os
import platform

import torch

from . import __version__
from .backends import BACKENDS, choose, cpu, triton, unavailable_reason

FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def cpu_features() -> str:
    """The vector extensions among the processor's flags, where the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return "unknown"
    flags = {w for line in text.splitlines() if line.lower().startswith(("flags", "features")) for w in line.split()}
    return " ".join(f for f in FEATURES if f in flags) or "none of " + " ".join(FEATURES)


def main() -> None:
    compiler = (
        "not installed" if triton.triton is None else triton.triton.__version__
    )  # ROCm's package has another name
    print(f"flashattn {__version__}, torch {torch.__version__}, triton {compiler}")
    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"CPU features: {cpu_features()}; {torch.get_num_threads()} threads")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"GPU: {torch.cuda.get_device_name() if device.type == 'cuda' else 'none'}\n")
    for name in BACKENDS:
        kinds = {device.type, "cpu"}
        reasons = {kind: unavailable_reason(name, kind, torch.float32) for kind in kinds}
        usable = [kind for kind, reason in reasons.items() if reason is None]
        runs = f"runs on {', '.join(sorted(usable))}"
        if name == "cpu":
            runs += f", instruction set {cpu.get_isa()}"
        note = runs if usable else reasons[device.type]
        print(f"  {name:<10} {'usable' if usable else 'not usable':<11} {note}")
    for bug in triton.list_compiler_bugs():
        print(f"\n{bug}")
    forced = os.environ.get("FLASHATTN_BACKEND")
    try:
        chosen = choose(device, torch.float32)
    except RuntimeError as error:
        chosen = f"none, {error}"
    print(f"\na call on {device.type} tensors goes to: {chosen}" + (f" (FLASHATTN_BACKEND={forced})" if forced else ""))


if __name__ == "__main__":
    main()
