"""`python -m bench gpu`: a rehearsal of every part, failing parts, the rules and the summary."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.gpu import (
    attention,
    card,
    check,
    command,
    decode,
    features,
    host,
    norms,
    precompile,
    results,
    rules,
    summary,
    varlen,
    verdicts,
)
from bench.gpu.card import REHEARSAL
from bench.gpu.clock import RehearsalClock
from bench.gpu.compare import OURS, Comparison, compare
from bench.gpu.context import Context, Settings
from bench.gpu.parts import PARTS, PRECOMPILED, choose
from bench.gpu.supervisor import PRELOADED, describe
from bench.named_kernel import UsageError

ROOT = Path(__file__).parents[2]
MEASURED = {"attention": attention, "decode": decode, "varlen": varlen, "norms": norms, "features": features}


def bench(*arguments, **environment):
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def make_context(out, part="attention", rehearse=True, compiling=False) -> Context:
    now = time.monotonic()
    return Context(Settings(part, PRECOMPILED, out, REHEARSAL, rehearse, now, now + 1000.0), compiling)


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["gpu"], ["attention", "--device", "cuda"], ["gpu", "--budget", "0"]])
def test_one_line_without_a_gpu(arguments):
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "--" in done.stderr  # names an option


def test_help_lists_parts_and_rules():
    text = bench("gpu", "--help").stdout
    assert all(part.help in text for part in PARTS.values())
    assert rules.TEXT in text


def test_order_of_parts():
    assert [part.name for part in choose(["norms", "ceilings"])] == ["ceilings", "precompile", "norms"]
    assert [part.name for part in choose(["check"])] == ["check"]
    assert [part.name for part in choose(None)] == list(PARTS)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(exit code, directory) of the parts that measure, with an empty cache of kernels."""
    out, cache = tmp_path_factory.mktemp("rehearsal"), tmp_path_factory.mktemp("cache")
    parts = ["ceilings", *MEASURED, "host"]
    done = bench(
        "gpu", "--rehearse", "--out", str(out), "--only", *parts, "--budget", "900", TRITON_CACHE_DIR=str(cache)
    )
    assert done.stderr == ""
    return done, out


def test_rehearsal_is_correct(rehearsal):
    done, out = rehearsal
    assert done.returncode == 0, done.stdout
    ends = results.read(out, "end")
    assert [end["outcome"] for end in ends] == ["done"] * 8
    assert all(end["cases"] == end["of_cases"] > 0 for end in ends)
    assert {file.name for file in out.iterdir()} == {"results.jsonl", "summary.txt", "log.txt"}
    assert (out / "summary.txt").read_text().splitlines() == done.stdout.splitlines()[-len(read_summary(out)) :]


def read_summary(out) -> list[str]:
    return (out / "summary.txt").read_text().splitlines()


HEAD = {
    "date", "torch", "triton", "flashattn", "cuda", "commit", "dirty", "name", "architecture", "multiprocessors",
    "l2_bytes", "memory_bytes", "driver", "sm_clock_mhz", "memory_clock_mhz", "power_limit_w", "power_draw_w",
    "temperature_c", "throttle",
}  # fmt: skip
TIMED = {"us", "us_low", "us_high", "runs", "by", "copies", "warm", "error", "allowed", "correct", "same_bits"}
KEYS = {
    "ceilings": {"us", "runs"},
    "precompile": {"for", "kernel", "peer", "seconds", "cpu_seconds"},
    "attention": {*TIMED, "variant", "tflops", "share", "pass", "causal", "seq", "head_dim"},
    "decode": {*TIMED, "variant", "gbps", "share", "batch", "keys", "page"},
    "varlen": {*TIMED, "variant", "tflops", "share", "pass", "sequences", "tokens"},
    "norms": {*TIMED, "variant", "gbps", "share", "pass", "norm", "rows", "cols"},
    "features": {*TIMED, "variant", "pass", "feature"},
    "host": {"variant", "eager_us", "us", "replay_us", "by"},
}


@pytest.mark.parametrize("part", KEYS)
def test_rows_of_a_rehearsal(rehearsal, part):
    _, out = rehearsal
    lines = results.read(out, part=part)
    assert lines[0]["kind"] == "head"
    assert lines[0].keys() >= HEAD
    rows = results.read(out, "row", part)
    ours = [row for row in rows if row.get("variant", OURS) in (OURS, "plain")]
    assert ours
    assert all(row.keys() >= {"case", *KEYS[part]} for row in ours)
    others = [row for row in rows if row.get("variant") not in (OURS, None)]
    assert all("ratio" in row or "failed" in row for row in others if part in MEASURED)


def test_nothing_is_compiled_during_measurement(rehearsal):
    """Triton finds each kernel that is launched in its cache on disk, where other processes compiled it."""
    _, out = rehearsal
    late = {line["part"]: line["compiled"] for line in results.read(out, "tail")}
    assert late.keys() == {"ceilings", *MEASURED, "host"}
    assert [name for name, _ in late.pop("ceilings")] == ["empty_kernel"]
    assert not any(late.values())


# ------------------------------------------------------------------------------------------------ parts that fail

RUN = """
import sys
from pathlib import Path
from bench.gpu.card import REHEARSAL
from bench.gpu.parts import Part
from bench.gpu.supervisor import Run, run_all
parts = [Part(name, float(share), "", "tests.bench.parts") for name, share in (x.split("=") for x in sys.argv[3:])]
run_all(Run(parts, float(sys.argv[2]), Path(sys.argv[1]), REHEARSAL, True))
"""


def run_parts(out, budget: float, *parts: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RUN, str(out), str(budget), *parts], cwd=ROOT)


def test_other_parts_run_after_a_failure(tmp_path):
    assert run_parts(tmp_path, 1000, "raises=1", "crashes=1", "good=1").wait() == 0
    ends = {end["part"]: end for end in results.read(tmp_path, "end")}
    assert {name: end["outcome"] for name, end in ends.items()} == {
        "raises": "failed", "crashes": "failed", "good": "done"
    }  # fmt: skip
    assert ends["raises"]["error"] == "ValueError: a part that raises"
    assert ends["crashes"]["error"] == "killed by SIGSEGV"
    assert {name: end["rows"] for name, end in ends.items()} == {"raises": 2, "crashes": 1, "good": 2}
    assert not summary.is_correct(results.read(tmp_path))
    assert "a part that raises" in "\n".join(summary.summarise(results.read(tmp_path)))


def is_gone(group: int) -> bool:
    """Within a minute: a killed process stays a zombie for a while."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_part_that_hangs_is_killed(tmp_path):
    """With all processes that it started; later parts still get their share."""
    start = time.monotonic()
    assert run_parts(tmp_path, 60, "hangs=1", "good=9").wait() == 0
    assert time.monotonic() - start < 60
    ends = {end["part"]: end for end in results.read(tmp_path, "end")}
    assert ends["hangs"]["outcome"] == "stopped"
    assert ends["good"]["outcome"] == "done"
    assert describe(ends["hangs"]).startswith("hangs: stopped after 1 cases")
    pid = results.read(tmp_path, "head", "hangs")[0]["pid"]
    assert is_gone(pid)
    assert summary.is_correct(results.read(tmp_path))  # running out of time is no error


def test_a_killed_part_leaves_its_rows(tmp_path):
    running = run_parts(tmp_path, 1000, "hangs=1", "again=1")
    while not results.read(tmp_path, "row", "hangs"):
        assert running.poll() is None
        time.sleep(0.1)
    os.kill(results.read(tmp_path, "head", "hangs")[0]["pid"], signal.SIGKILL)
    assert running.wait() == 0
    ends = {end["part"]: end for end in results.read(tmp_path, "end")}
    assert ends["hangs"]["error"] == "killed by SIGKILL"
    assert ends["hangs"]["rows"] == 1
    assert ends["again"]["outcome"] == "done"


def test_tests_become_rows(tmp_path, monkeypatch):
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--rehearse-gpu')\n"
        "def pytest_configure(config):\n    config.addinivalue_line('markers', 'gpu: of the test')\n"
    )
    tests = tmp_path / "test_them.py"
    tests.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'these differ'\n"
        "def test_left_out(): pytest.skip('no second device')\n"
        "@pytest.fixture\ndef broken(): raise OSError('no such thing')\n"
        "def test_broken(broken): pass\n"
    )
    monkeypatch.setattr(check, "TESTS", str(tests))
    monkeypatch.setattr(check, "REHEARSAL_STEP", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    rows = {row["case"].split("::")[1]: row for row in check.run(make_context(tmp_path, "check"))}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_right": "passed", "test_wrong": "failed", "test_left_out": "skipped", "test_broken": "failed"
    }  # fmt: skip
    assert "these differ" in rows["test_wrong"]["message"]
    assert "no such thing" in rows["test_broken"]["message"]
    assert rows["test_left_out"]["message"].endswith("no second device")
    assert {name for name, row in rows.items() if not row["correct"]} == {"test_wrong", "test_broken"}
    assert results.read(tmp_path, "plan", "check")[0]["cases"] == 4


def test_rehearsal_of_check(tmp_path):
    done = bench("gpu", "--rehearse", "--only", "check", "--out", str(tmp_path), "--budget", "900")
    assert done.returncode == 0, done.stdout
    assert any(row["outcome"] == "passed" for row in results.read(tmp_path, "row", "check"))


# ------------------------------------------------------------------------------------------------ the rules


def compare_with_ones(tmp_path, **variants) -> dict[str, dict]:
    """The rows of a case whose truth is a tensor of ones, to which PyTorch's operations come within 1e-3."""
    exact = torch.ones(100, dtype=torch.float64)
    truth = verdicts.Truth([exact], [torch.full((100,), 1.001)])
    comparison = Comparison("ones", {}, variants, 400, lambda: truth, lambda outputs: outputs, flops=1e12)
    return {row["variant"]: row for row in compare(make_context(tmp_path), comparison)}


def test_wrong_results_are_found(tmp_path):
    off = torch.full((100,), 1.003)
    spike = torch.ones(100)
    spike[7] = 1.015  # within the limit on the mean, beyond that on one element
    for wrong in (off, spike, torch.full((100,), torch.nan)):
        assert not compare_with_ones(tmp_path, flashattn=lambda wrong=wrong: lambda: wrong.clone())[OURS]["correct"]
    assert compare_with_ones(tmp_path, flashattn=lambda: lambda: torch.full((100,), 1.0015))[OURS]["correct"]


def test_other_bits_after_timing_are_wrong(tmp_path):
    calls = []

    def drifts() -> torch.Tensor:
        calls.append(1)
        return torch.full((100,), 1 + 1e-6 * len(calls))

    row = compare_with_ones(tmp_path, flashattn=lambda: drifts)[OURS]
    assert row["error"] <= row["allowed"]
    assert not row["same_bits"]
    assert not row["correct"]


def test_unwritten_memory_is_found(tmp_path):
    """Ours runs once into memory full of NaN; peers do not, so that torch.compile compiles them only once."""
    torch.use_deterministic_algorithms(False)  # set by the tests; fills memory too
    filled = []

    def run(name: str) -> torch.Tensor:
        filled.append((name, bool(torch.empty(5).isnan().all())))
        return torch.ones(100)

    compare_with_ones(tmp_path, flashattn=lambda: lambda: run(OURS), other=lambda: lambda: run("other"))
    assert filled[:2] == [(OURS, True), ("other", False)]
    assert not torch.are_deterministic_algorithms_enabled()


def test_peers_that_raise_are_rows(tmp_path):
    def raises():
        raise RuntimeError("not supported\nby this card")

    rows = compare_with_ones(tmp_path, flashattn=lambda: lambda: torch.ones(100), other=raises)
    assert rows["other"]["failed"] == "RuntimeError: not supported"
    assert rows["other"]["correct"]
    assert rows[OURS]["correct"]
    rows = compare_with_ones(
        tmp_path, flashattn=lambda: lambda: torch.ones(100), other=lambda: lambda: torch.zeros(100)
    )
    assert (rows["other"]["in_bounds"], rows["other"]["correct"]) == (False, True)
    rows = compare_with_ones(tmp_path, flashattn=raises, other=lambda: lambda: torch.ones(100))
    assert not rows[OURS]["correct"]
    assert rows["other"]["us"] > 0


def test_measure_takes_turns(tmp_path):
    """Every variant equally often, and each of them first in some rounds."""
    context, order = make_context(tmp_path), []
    context.clock.rounds = (6, 6)
    times = context.measure({name: lambda name=name: order.append(name) for name in "abc"})
    assert [t.runs for t in times.values()] == [6] * 3
    firsts = order[::3]
    assert sorted(firsts) == sorted("abc" * 2)
    assert all(t.low <= t.median <= t.high for t in times.values())


@pytest.mark.parametrize(
    "gpu_seconds, host_seconds, captured, by",
    [
        (1e-3, 1e-4, False, "events"),
        (1e-5, 1e-6, True, "graph"),
        (3e-4, 1e-3, True, "graph"),  # otherwise the host would be timed
        (1e-5, 2e-4, None, "events, not captured: ValueError: it cannot"),
    ],
)
def test_short_calls_are_captured(tmp_path, gpu_seconds, host_seconds, captured, by):
    kept_busy = []

    class Clock(RehearsalClock):
        def estimate(self, call):
            return gpu_seconds, host_seconds

        def capture(self, run):
            if captured is None:
                raise ValueError("it cannot")
            return run

        def time(self, run, host_seconds=0.0):
            kept_busy.append(host_seconds)
            return super().time(run)

    context = make_context(tmp_path)
    context.clock = Clock()
    times = context.measure({"call": lambda: torch.ones(1)})["call"]
    assert times.by == by
    assert kept_busy[-1] == (0.0 if captured else host_seconds)


def test_the_forkserver_does_not_query_the_gpu():
    """CUDA does not work in the fork of a process that did."""
    code = f"""
import importlib, torch
def asked(*_): raise AssertionError("asked for a GPU")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = asked
for name in {PRELOADED}: importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_copies_exceed_the_cache(tmp_path):
    context = make_context(tmp_path)
    context.card = context.card._replace(l2_bytes=1000)
    assert [context.count_copies(size) for size in (1, 1000, 1001, 2999, 3000, 5000)] == [64, 3, 3, 2, 1, 1]


# ------------------------------------------------------------------------------------------------ head and summary


def test_card_state(tmp_path, monkeypatch):
    """From a fake nvidia-smi that lacks one field, and reports another as N/A."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "fields = next(a for a in sys.argv if a.startswith('--query-gpu=')).split('=')[1].split(',')\n"
        "known = {'driver_version': '580.1', 'clocks.sm': '1980', 'power.limit': '700.00', 'power.draw': '[N/A]',\n"
        "'temperature.gpu': '40', 'clocks_throttle_reasons.active': '0x0000000000000005', 'memory.total': '81559'}\n"
        "if not set(fields) <= set(known): sys.exit('not a valid field to query')\n"
        "print(', '.join(known[f] for f in fields))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = card.read_state(REHEARSAL._replace(name="NVIDIA H100"))
    assert found == {
        "driver": 580.1, "sm_clock_mhz": 1980, "memory_clock_mhz": None, "power_limit_w": 700, "power_draw_w": None,
        "temperature_c": 40, "throttle": "idle, power cap", "memory_mib": 81559,
    }  # fmt: skip
    monkeypatch.setenv("PATH", "")
    assert set(card.read_state(REHEARSAL._replace(name="NVIDIA H100")).values()) == {None}


def test_summary_of_a_full_run_fits(tmp_path, monkeypatch):
    """Every case at its true shapes, with made-up figures."""
    # Tensors of many gigabytes: the system gives no memory to pages that are never written.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    for part, module in MEASURED.items():
        context = make_context(tmp_path, part, rehearse=False, compiling=True)
        for case in module.list_cases(False):
            with precompile.compile_only(context.settings, lambda *_: False):
                made = module.make_comparison(context, case)
            for name in made.variants:
                row = {"case": made.name, **made.settings, "variant": name, "us": 1.0, "tflops": 600.0, "share": 0.75}
                ratio = {} if name == OURS else {"ratio": 0.9, "unsure": True}
                results.append(tmp_path, "row", part, row | {"correct": True} | ratio)
    for name in PARTS:
        results.append(tmp_path, "head", name, card.describe_run(REHEARSAL))
        end = {"outcome": "done", "cases": 80, "of_cases": 80, "rows": 80, "seconds": 30.0, "error": None}
        results.append(tmp_path, "end", name, end)
    lines = summary.summarise(results.read(tmp_path))
    assert len(lines) < 100
    assert max(map(len, lines)) <= summary.WIDTH
    assert not [line for line in lines if "more lines" in line]


def test_summary_lists_errors(tmp_path):
    results.append(tmp_path, "row", "decode", {"case": "some keys", "error": 0.5, "allowed": 0.1, "correct": False})
    lines = summary.summarise(results.read(tmp_path))
    assert "WRONG: decode: some keys, error 0.5, allowed 0.1" in lines
    assert not summary.is_correct(results.read(tmp_path))


KEPT = {  # files in bench/results: the exit code, and a line of the summary
    "h100-2026-11-26.jsonl": (1, "check: 62 failed, 206 passed, 2 skipped"),
    "h200-2026-11-26-1.jsonl": (1, "  product 8192^3 bfloat16      810 TFLOP/s"),
    "h200-2026-11-26-2.jsonl": (0, "check: 266 passed, 2 skipped"),
    "h200-2026-11-26-3.jsonl": (1, "  product 8192^3 bfloat16      789 TFLOP/s"),
    "h200-2026-11-27-1.jsonl": (1, "check: 61 passed, 210 failed"),
    "h200-2026-11-28.jsonl": (0, "check: 271 passed, 2 skipped"),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_results_are_shown(name, capsys):
    code, line = KEPT[name]
    assert command.run(parse_command_line(f"--summary={ROOT / 'bench' / 'results' / name}")) == code
    lines = capsys.readouterr().out.splitlines()
    assert line in lines
    assert len(lines) < 100


def test_wrong_use_of_summary_is_one_line(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"kind": "row"}\n')
    for wrong in ([str(tmp_path)], [str(tmp_path / "other.jsonl")], [str(tmp_path / "other.jsonl"), "--rehearse"]):
        with pytest.raises(UsageError, match="--summary"):
            command.run(parse_command_line("--summary", *wrong))


def parse_command_line(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["gpu", *arguments])


def test_rows_are_json_even_with_nan(tmp_path):
    results.append(tmp_path, "row", "norms", {"error": float("nan"), "nested": [float("inf")]})
    (line,) = (tmp_path / results.NAME).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "kind": "row", "part": "norms", "error": "nan", "nested": ["inf"]
    }  # fmt: skip


def test_every_precompiled_part_lists_its_cases():
    modules = {**MEASURED, "host": host}
    assert set(modules) == set(PRECOMPILED)
    assert all(module.list_cases(rehearse) for module in modules.values() for rehearse in (False, True))
