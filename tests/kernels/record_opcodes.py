"""python -m tests.kernels.record_opcodes [--check] [-j PROCESSES] [WORD …]: compile every case of `opcodes.py` and
record what it compiles to in opcodes.json, or with --check compare it with what is recorded there (exit code 1 where
something differs). Words choose cases and architectures. A few minutes of each core, less where Triton's cache has the
kernels."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

from tests.kernels import opcodes
from tests.kernels.opcodes import Code


def compile_all(words: list[str], processes: int) -> dict[str, dict[str, dict[str, Code]]]:
    found: dict[str, dict[str, dict[str, Code]]] = {}
    chosen = list(opcodes.jobs(words))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(opcodes.compile_case, *job) for job in chosen]
        for (name, architecture), future in zip(chosen, futures, strict=True):
            found.setdefault(name, {})[architecture] = future.result()
            print(f"{name}, {architecture}: {len(future.result())} kernels", file=sys.stderr, flush=True)
    return found


def differences(found, recorded) -> list[str]:
    lines = []
    for name, architectures in found.items():
        for architecture, kernels in architectures.items():
            before = recorded.get(name, {}).get(architecture, {})
            for kernel in sorted(kernels.keys() | before.keys()):
                was, now = before.get(kernel), kernels.get(kernel)
                if was != now:
                    lines.append(f"{name}, {architecture}, {kernel}: {was} recorded, {now} compiled")
    return lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.record_opcodes", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, record nothing")
    parser.add_argument("-j", "--processes", type=int, default=1)
    parser.add_argument("words", nargs="*", help="only cases and architectures whose name holds one of these")
    options = parser.parse_args(arguments)
    found = compile_all(options.words, options.processes)
    count = sum(len(kernels) for architectures in found.values() for kernels in architectures.values())
    recorded = opcodes.read_table() if opcodes.TABLE.exists() else {}
    lines = differences(found, recorded) if recorded else []
    print("\n".join([*lines, f"{count} kernels compiled, {len(lines)} not as recorded"]))
    if options.check:
        return 1 if lines or not recorded else 0
    cases = {name: recorded.get(name, {}) | found.get(name, {}) for name in opcodes.CASES}
    opcodes.write_table({name: archs for name, archs in cases.items() if archs})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
