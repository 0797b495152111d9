"""The command lines of model and bench, as a person calls them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bench.__main__
from flashattn.backends import BACKENDS
from tests.packages import needs_minilm, needs_smollm2

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@needs_smollm2
def test_generate():
    done = run(
        "model", "generate", "--model", "smollm2", "--prompt", "The capital of France is", "--max-new-tokens", "8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is Paris")
    assert "tokens/s" in done.stdout
    assert "greedy tokens equal the reference backend's: yes" in done.stdout


@needs_smollm2
def test_generate_json_and_chat():
    done = run(
        "model", "generate", "--model", "smollm2", "--prompt", "Name one colour.", "--chat", "--json",
        "--max-new-tokens", "6", "--temperature", "0.7", "--top-k", "20", "--top-p", "0.9", "--seed", "1",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert set(result) == {"tokens", "text", "tokens_per_second"}


def heed_interrupts():
    """A process that a shell starts in the background is told to ignore them, and would pass that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@needs_smollm2
def test_ctrl_c_leaves_cleanly():
    command = [
        sys.executable,
        "-m",
        "model",
        "generate",
        "--model",
        "smollm2",
        "--prompt",
        "x",
        "--max-new-tokens",
        "4000",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heed_interrupts
    )
    assert process.stdout.read(1) == "x"  # it is generating
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


@needs_minilm
def test_embed():
    done = run("model", "embed", "--model", "minilm", "A man is eating food.", "A man is eating a piece of bread.")
    assert done.returncode == 0, done.stderr
    assert "0.7553" in done.stdout


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["generate", "--model", "/nowhere", "--prompt", "x"], 1, "error: /nowhere: no such file or directory"),
        (["generate", "--model", "smollm2"], 2, "required: --prompt"),
        (["embed", "--model", "minilm"], 2, "SENTENCE"),
        (["dance"], 2, "invalid choice"),
    ],
)
def test_errors(arguments, code, message):
    done = run("model", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [["model"], ["model", "generate"], ["bench"], ["bench", "attention"], ["bench", "ptx"], ["bench", "compiled"]],
)
def test_help(command):
    done = run(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m {command[0]}")
    if command in (["model", "generate"], ["bench", "attention"]):  # which write them out, to import no torch
        assert f"--backend {{{','.join(BACKENDS)}}}" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["generate", "--model", "smollm2"]])
def test_help_of_model_imports_no_torch(arguments):
    """Nor flashattn; so help and usage errors come at once."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "model", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert not {name.partition(".")[0] for name in imported} & {"torch", "numpy", "flashattn", "tokenizers"}
    assert imported & {"model.commands", "model.train_command"} == set()


def test_bench(tmp_path):
    table, plot = tmp_path / "t.jsonl", tmp_path / "p.png"
    done = run(
        "bench", "attention", "--shape", "1,2,63,16", "--dtype", "bfloat16", "--causal", "--backward",
        "--seconds", "0.05", "--json", str(table), "--plot", str(plot),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(table.read_text())
    assert result["command"] == "python -m bench attention --shape 1,2,63,16 --dtype bfloat16 --causal --backward"
    assert result["runs"] >= 5
    assert result["backend"] == "cpu"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "ratio" in done.stdout
    assert "causal" in done.stdout


def test_bench_errors():
    assert run("bench", "attention", "--shape", "1,2,3").returncode == 2
    done = run("bench", "attention", "--shape", "1,1,8,300", "--backend", "cpu")
    assert done.returncode == 1
    assert "head_dim over 256" in done.stderr


def test_bench_ptx(tmp_path):
    """The project's kernel: its source with counts, a page, figures; the counts in all three are one."""
    page, figures = tmp_path / "page.html", tmp_path / "figures.jsonl"
    done = run(
        "bench", "ptx", "attention", "--shape", "1,1,70,16", "--arch", "sm_90", "--backward", "--lines",
        "--html", str(page), "--json", str(figures),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "grad_v: largest error against float64" in done.stdout
    assert "return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)" in done.stdout
    launches = [json.loads(line) for line in figures.read_text().splitlines()]
    passes = ["forward", "backward_q", "backward_kv"]
    assert [x["kernel"] for x in launches] == [f"attention_{name}_hopper" for name in passes]
    for launch in launches:
        assert launch["flops"] > 0
        assert launch["bound"] in launch["bounds_us"]
        assert f"{launch['issued']:,}" in done.stdout
        assert f"{launch['issued']:,}" in page.read_text(encoding="utf-8")


def test_bench_ptx_of_any_kernel():
    kernel = "tests/ptx/kernels.py:softmax"
    arguments = ["x=float32[4,100]", "out=float32[4,100]", "cols=100", "BLOCK=128"]
    done = run("bench", "ptx", kernel, *arguments, "--grid", "4")
    assert done.returncode == 0, done.stderr
    assert "4 blocks of 128 threads" in done.stdout
    over = run("bench", "ptx", kernel, *arguments, "--grid", "5")
    assert over.returncode == 1
    assert "past the end of x, float32[4, 100]" in over.stderr
    assert "ptx/kernels.py:" in over.stderr
    assert "Traceback" not in over.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "takes attention, norm, decode, precision or file.py:function"),
        (["attention", "--shape", "1,2,3"], "takes BATCH,HEADS,SEQ,HEAD_DIM"),
        (["tests/ptx/kernels.py:nothing"], "has no function nothing; it has copy, softmax"),
        (["tests/nothing.py:softmax"], "no file"),
        (["tests/ptx/kernels.py:softmax", "x=float32[4]"], "no value for out, cols, BLOCK"),
        (["tests/ptx/kernels.py:softmax", "x=float33[4]"], "x: 'float33' is not a dtype"),
        (["tests/ptx/kernels.py:softmax", "x"], "arguments are given as name=value"),
    ],
)
def test_bench_ptx_errors(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "ptx", *arguments])
    try:
        code = bench.__main__.main()
    except SystemExit as usage:
        code = usage.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_bench_compiled(tmp_path):
    figures = tmp_path / "figures.jsonl"
    done = run(
        "bench", "compiled", "tests/ptx/kernels.py:matmul", "a=*fp16", "b=*fp16", "c=*fp16", "M=512", "N=512", "K=512",
        "stride_a=512", "stride_b=512", "stride_c=512", "BLOCK_M=64", "BLOCK_N=64", "BLOCK_K=32",
        "--arch", "sm_80", "--arch", "gfx942", "--json", str(figures),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    nvidia, amd = (json.loads(line) for line in figures.read_text().splitlines())
    assert (nvidia["architecture"], amd["architecture"]) == ("sm_80", "gfx942")
    assert nvidia["loops"][0]["flops"] == 2 * 64 * 64 * 32 // nvidia["warps"]  # a turn of the loop is one BLOCK_K
    assert 0 < nvidia["occupancy"] <= 1
    assert 0 < amd["occupancy"] <= 1
    assert "slots/KFLOP" in done.stdout
