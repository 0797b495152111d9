"""The search for tiles, in the library and in `bench gpu`; and rehearsals of the parts counters and profile."""

import importlib.util
import os
import sys
import time

import pytest
import torch

from tests.common import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import ptx
from bench.compiled import Kernel
from bench.gpu import counters, profile
from bench.gpu import tune as part
from bench.gpu.card import REHEARSAL
from bench.gpu.context import Context, Settings, prepare_device
from flashattn.backends import triton as backend
from flashattn.kernels import configs, tune
from flashattn.kernels.configs import TileConfig
from flashattn.kernels.tune import Times
from flashattn.protocol import Saved
from flashattn.score import Score

ROW = TileConfig(64, 64, 8, 2)
TABLE = {tiles for by_family in configs.ATTENTION.values() for rows in by_family.values() for *_, tiles in rows}


LIMITS = {TileConfig(16, 256, 4, 1), TileConfig(256, 16, 8, 4)}


@pytest.mark.parametrize("row", sorted(TABLE | LIMITS | {tiles for *_, tiles in configs.DECODE}), ids=str)
def test_neighbours(row):
    found = tune.list_neighbours(row)
    changes = [sum(a != b for a, b in zip(tiles, row, strict=True)) for tiles in found]
    assert set(changes) <= {1, 2}
    assert changes == sorted(changes)
    assert len(set(found)) == len(found) > 10
    for tiles in found:
        assert 16 <= min(tiles.block_m, tiles.block_n) <= max(tiles.block_m, tiles.block_n) <= 256
        assert tiles.warps in (4, 8)
        assert tiles.stages in (1, 2, 3, 4)


def test_neighbours_change_each_field_both_ways():
    found = tune.list_neighbours(ROW)
    alone = [ROW._replace(**change) for change in (
        dict(block_m=32), dict(block_m=128), dict(block_n=32), dict(block_n=128), dict(warps=4), dict(stages=1),
        dict(stages=3), dict(stages=4),
    )]  # fmt: skip
    assert set(found[:8]) == set(alone)
    assert TileConfig(128, 32, 8, 2) in found


def run_search(medians: dict[TileConfig, float], spread=0.0, wrong=()) -> tune.Found:
    def measure(found):
        return {tiles: Times(medians[tiles], medians[tiles] - spread, medians[tiles] + spread) for tiles in found}

    candidates = [tiles for tiles in medians if tiles != ROW]
    return tune.search(ROW, candidates, lambda tiles: "wrong" if tiles in wrong else None, measure)


A, B = tune.list_neighbours(ROW)[:2]


def test_search_takes_the_fastest():
    found = run_search({ROW: 3.0, A: 2.0, B: 1.0})
    assert found.best == B
    assert list(found.times) == [ROW, A, B]


def test_search_times_nothing_that_is_refused():
    found = run_search({ROW: 3.0, A: 2.0, B: 1.0}, wrong=(B,))
    assert found.best == A
    assert found.refused == {B: "wrong"}
    assert B not in found.times


def test_search_keeps_the_row_where_the_gain_is_within_the_spread():
    assert run_search({ROW: 3.0, A: 2.8}, spread=0.2).best == ROW
    assert run_search({ROW: 3.0, A: 2.5}, spread=0.2).best == A


def test_results_are_the_same_but_for_rounding():
    x = torch.randn(4, 100)
    half = x.bfloat16()
    assert tune.is_same((half, None), (half, None))
    assert tune.is_same((half * (1 + 2**-7),), (half,))
    assert tune.is_same((x + 1e-6,), (x,))
    assert not tune.is_same((x + 1e-3,), (x,))
    missing = half.clone()
    missing[0, 7] = 0  # below the tolerance of a sum over all elements
    missing[0, 7], half[0, 7] = 0, 1
    assert not tune.is_same((missing,), (half,))
    empty = torch.full((3,), -torch.inf)
    assert tune.is_same((empty,), (empty,))
    assert not tune.is_same((empty,), (torch.zeros(3),))
    assert not tune.is_same((torch.zeros(3),), (empty,))
    nan = torch.tensor([torch.nan])
    assert not tune.is_same((nan,), (nan,))


@pytest.fixture
def gpu():
    torch.use_deterministic_algorithms(False)
    with ptx.device("sm_80") as device:
        yield device


Q, K, V = torch.randn(3, 1, 1, 20, 16).bfloat16()
CAUSAL = Score(0.25, right=0)


def run_forward(score=CAUSAL):
    return backend.forward(Q, K, V, score)


def test_what_does_not_fit_or_spills_is_not_launched(gpu, monkeypatch):
    (kernel,) = tune.compile_call(run_forward)
    assert not gpu.launches
    fits = kernel.metadata
    monkeypatch.setattr(kernel, "metadata", fits._replace(shared=10**6))
    assert tune.rejection_reason(kernel) == "1,000,000 of shared memory, of which there are 166,912"
    monkeypatch.setattr(kernel, "metadata", fits)
    monkeypatch.setattr(gpu, "load_binary", lambda *_: ("module", "function", 255, 12, 1024))
    assert tune.rejection_reason(kernel) == "12 registers spilled"
    assert not gpu.launches


@pytest.fixture
def autotune(monkeypatch):
    """FLASHATTN_AUTOTUNE=1 without a GPU: a fake timer and two candidates. The list of timed tiles."""
    timed = []

    def measure(calls):
        timed.append(list(calls))
        return {tiles: Times(1.0 / tiles.stages, 1.0 / tiles.stages, 1.0 / tiles.stages) for tiles in calls}

    monkeypatch.setattr(tune, "ENABLED", True)
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # without CUDA it raises
    monkeypatch.setattr(tune, "list_neighbours", lambda row: [row._replace(stages=n) for n in (1, 3)])
    return timed


def test_autotune_searches_once_for_each_kind_of_call(gpu, autotune):
    expected = run_forward()
    out, *_ = tune.call(backend.forward, Q, K, V, CAUSAL)
    assert tune.is_same((out,), expected[:1])
    (chosen,) = tune._chosen.values()
    assert chosen.stages == max(tiles.stages for tiles in autotune[0]) > 1
    ran = len(gpu.launches)
    tune.call(backend.forward, Q, K, V, CAUSAL)
    assert (len(autotune), len(gpu.launches)) == (1, ran + 1)
    tune.call(backend.forward, Q, K, V, CAUSAL._replace(softcap=20.0))
    assert len(autotune) == len(tune._chosen) == 2


def test_autotune_searches_each_pass_of_backward(gpu, autotune):
    out, lse, rest = run_forward()
    arguments = (torch.randn(1, 1, 20, 16).bfloat16(), None, Saved(Q, K, V, out, lse, rest), CAUSAL, False)
    expected = backend.launch_backward(*arguments)
    assert tune.is_same(tune.call(backend.launch_backward, *arguments), expected)
    assert {kind[0] for kind in tune._chosen} == {"backward_q", "backward_kv"}


def test_autotune_searches_kernels_in_roles(autotune, monkeypatch):
    monkeypatch.setitem(configs.HOPPER_CANDIDATES["forward"], 64, configs.HOPPER_CANDIDATES["forward"][64][:2])
    torch.use_deterministic_algorithms(False)
    with ptx.device("sm_90") as device:
        expected = run_forward()
        out, *_ = tune.call(backend.forward, Q, K, V, CAUSAL)
        assert tune.is_same((out,), expected[:1])
        assert {launch.kernel for launch in device.launches} == {"attention_forward_hopper"}
        rows = [configs.HOPPER["forward"][64], *configs.HOPPER_CANDIDATES["forward"][64]]
        assert autotune == [rows]
        assert list(tune._chosen.values()) == [min(rows, key=lambda row: 1 / row.stages)]
        with tune.force_tiles("forward", ROW):
            run_forward()
        assert device.launches[-1].kernel == "attention_forward"


def test_autotune_refuses_another_result(gpu, autotune, monkeypatch):
    monkeypatch.setattr(tune, "is_same", lambda results, expected: False)
    tune.call(backend.forward, Q, K, V, CAUSAL)
    (chosen,) = tune._chosen.values()
    assert autotune == [[chosen]]
    assert chosen == configs.choose_tiles("forward", (16, 16), 2)


def test_autotune_does_nothing_on_cpu_tensors(gpu, autotune):
    run_forward()
    assert not autotune
    assert not tune._chosen


@pytest.mark.parametrize(
    "wanted, interpret, enabled", [(None, "0", False), ("0", "0", False), ("1", "0", True), ("1", "1", False)]
)
def test_autotune_is_off_by_default_and_in_the_interpreter(monkeypatch, wanted, interpret, enabled):
    monkeypatch.delenv("FLASHATTN_AUTOTUNE", raising=False)
    if wanted:
        monkeypatch.setenv("FLASHATTN_AUTOTUNE", wanted)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    spec = importlib.util.spec_from_file_location("flashattn.kernels.tune_again", tune.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert bool(again.ENABLED) is enabled


# --------------------------------------------------------------------------------------------- bench gpu: tune

LOOP = """
.L_x_1:
        /*0100*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0110*/                   {} R20, R21 ;
        /*0120*/              @!P0 BRA `(.L_x_1) ;
"""


def make_kernel(code: str, shared=1000) -> Kernel:
    return Kernel("attention_forward", "sm_90", 255, 64, 2, shared, 1, 8, code)


def test_candidates_are_refused_by_their_loops():
    spilling, outside = (
        make_kernel(LOOP.format("LDL")),
        make_kernel("        /*0000*/ STL [R1], R2 ;" + LOOP.format("FADD")),
    )
    assert part.inspect(ROW, spilling).refused == "1 accesses to local memory in its loops"
    static = part.inspect(ROW, outside)
    assert (static.refused, static.slots) == (None, 2 / 4096 * 1024)
    large = part.inspect(ROW, make_kernel(LOOP.format("FADD"), shared=232449))
    assert large.refused == "232,449 bytes of shared memory, over the limit of 232,448"


def test_the_most_promising_candidates_come_first():
    few, many, waits, unknown = (
        part.Candidate(ROW._replace(stages=stages), slots=slots)
        for stages, slots in ((2, 0.5), (3, 0.9), (1, 0.1), (4, None))
    )
    assert sorted([waits, unknown, many, few], key=part.rank) == [few, many, unknown, waits]


def make_rehearsal(module, tmp_path) -> Context:
    torch.use_deterministic_algorithms(False)
    now = time.monotonic()
    return Context(Settings(module.__name__.split(".")[-1], (), tmp_path, REHEARSAL, True, now, now + 300.0))


def rehearse(module, tmp_path) -> list[dict]:
    context = make_rehearsal(module, tmp_path)
    with prepare_device(context):
        return list(module.run(context))


def test_part_tune(tmp_path, monkeypatch):
    monkeypatch.setattr(part, "REHEARSAL_ROWS", [part.Row("decode", 128)])
    (row,) = rehearse(part, tmp_path)
    assert row["correct"]
    assert list(row["seconds"]) == list(row["slots"]) == ["16x64, 4 warps, 3 stages", "16x64, 4 warps, 1 stages"]
    assert row["best"] in row["seconds"]
    assert not row["refused"]
    row |= dict(best="16x64, 4 warps, 1 stages", changes=True, gain=1.25)
    row["seconds"] = {row["row"]: [2e-3, 1.9e-3, 2.1e-3], row["best"]: [1.6e-3, 1.5e-3, 1.7e-3]}
    assert part.summarise([row]) == [
        "1 rows of configs.py searched, 1 would change; median (quartiles)",
        "decode at head_dim 128: 16x64, 4 warps, 3 stages -> 16x64, 4 warps, 1 stages: 1.25x, "
        "2000.0 us (1900.0 to 2100.0) -> 1600.0 us (1500.0 to 1700.0) (1 timed, 0 refused)",
    ]


def test_part_tune_of_a_kernel_in_roles(tmp_path, monkeypatch):
    monkeypatch.setattr(part, "REHEARSAL_ROWS", [part.Row("forward", 64)])
    (row,) = rehearse(part, tmp_path)
    assert row["correct"]
    assert list(row["slots"]) == [f"2 consumers, tiles of 128, {stages} stages, ping-pong" for stages in (2, 3)]
    assert set(row["seconds"]) == set(row["slots"])
    assert not row["refused"]


def test_part_tune_refuses_a_wrong_candidate(gpu, monkeypatch):
    row, rounded = part.Row("forward", 64), backend.forward
    monkeypatch.setattr(part, "judge", lambda results, truth: part_judge([x * 1.1 for x in results], truth))
    part_judge = sys.modules["bench.gpu.verdicts"].judge
    make = part.make_calls(row, part.Size(1, 2, 1, 20, 20), torch.device("cpu"))
    assert "WRONG" in part.make_checker(row, make)(part.find_tiles(row))
    monkeypatch.undo()
    assert backend.forward is rounded
    assert part.make_checker(row, make)(part.find_tiles(row)) is None


def test_part_tune_leaves_out_what_changes_its_result(tmp_path, monkeypatch):
    """A race may show only under load: results are compared again after the timing."""
    monkeypatch.setattr(tune, "is_same", lambda results, expected: False)
    monkeypatch.setattr(part, "make_checker", lambda row, make: lambda tiles: None)
    row = part.Row("decode", 128)
    with prepare_device(context := make_rehearsal(part, tmp_path)):
        static = [
            part.Candidate(tiles) for tiles in (part.find_tiles(row), *tune.list_neighbours(part.find_tiles(row))[:1])
        ]
        result = part.search_row(context, row, static)
    assert (result["correct"], result["changes"]) == (False, False)
    assert list(result["seconds"]) == [part.describe_tiles(static[0].tiles)]
    assert result["refused"] == {part.describe_tiles(x.tiles): "another result after the timing" for x in static}


def test_part_tune_stops_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Context, "seconds_left", lambda self: 0.0)
    monkeypatch.setattr(part, "CompilerPool", NoCompilerPool)
    rows = rehearse(part, tmp_path)
    assert [row["skipped"] for row in rows] == ["no time left"] * len(part.REHEARSAL_ROWS)


class NoCompilerPool:
    def __init__(self, processes, candidates):
        assert all(len(tiles) == 2 for tiles in candidates.values())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


# --------------------------------------------------------------------------------------------- counters

# Written by hand, in the documented format of `ncu --csv --page raw`: not from a GPU.
RAW = """\
some output of the program
==PROF== Connected to process 7 (/usr/bin/python3)
==PROF== Profiling "norm_forward" - 0: 0%....50%....100% - 3 passes
==PROF== Disconnected from process 7
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","smsp__inst_executed.sum","sm__inst_executed_pipe_tensor_op_gmma.sum"
"","","","","","","","","","","","sector","inst","inst"
"0","7","python3","127.0.0.1","norm_forward","1","7","(128, 1, 1)","(32, 1, 1)","0","9.0","4,160","41,216.00","n/a"
"1","7","python3","127.0.0.1","norm_forward","1","7","(128, 1, 1)","(32, 1, 1)","0","9.0","1","1","1"
"""
DETAILS = """\
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","norm_forward","Command line profiler metrics","smsp__inst_executed.sum","inst","41,216"
"0","7","norm_forward","Command line profiler metrics","sm__inst_executed_pipe_tensor_op_gmma.sum","","n/a"
"1","7","norm_forward","Command line profiler metrics","smsp__inst_executed.sum","inst","1"
"""


def test_output_of_nsight_compute():
    sectors = {"l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": 4160}
    assert counters.parse(RAW) == {"smsp__inst_executed.sum": 41216, **sectors}
    assert counters.parse(DETAILS) == {"smsp__inst_executed.sum": 41216}
    assert counters.parse("") == counters.parse("==PROF== Connected\n==WARNING== No kernels were profiled.") == {}
    assert counters.parse(RAW.splitlines()[4]) == {}


# A fake ncu: runs the program that follows its own options and prints a table of the hand-written form.
FAKE = """\
#!{python}
import subprocess, sys
program = sys.argv[sys.argv.index("-m") - 1:]
subprocess.run(program, check=True)
print({output!r})
sys.exit({code})
"""


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch):
    def install(output: str, code=0):
        file = tmp_path / "ncu"
        file.write_text(FAKE.format(python=sys.executable, output=output, code=code))
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    monkeypatch.setattr(counters, "LAUNCHES", {"norm_forward": counters.launch_norm_forward})
    return install


def test_part_counters(tmp_path, fake_ncu):
    fake_ncu(RAW)
    rows = {row["quantity"]: row for row in rehearse(counters, tmp_path)}
    assert len(rows) == len(counters.QUANTITIES)
    assert rows["global sectors, L1"]["ncu"] == 4160
    assert rows["warp instructions"]["ratio"] == 41216 / rows["warp instructions"]["ptx"]
    assert (rows["tensor instructions"]["ncu"], rows["tensor instructions"]["ptx"]) == (None, 0)
    assert any("global sectors, L1" in line and "4,160 /" in line for line in counters.summarise(list(rows.values())))


@pytest.mark.parametrize(
    "output, reason",
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "this user may not read the GPU's counters"),
        ("==ERROR== Failed to find metric x", "==ERROR== Failed to find metric x"),
        ("", "ncu printed no counts and ended with 1"),
    ],
)
def test_nsight_compute_that_fails_is_a_reason(fake_ncu, monkeypatch, output, reason):
    fake_ncu(output, code=1)
    monkeypatch.setattr(sys, "executable", "true")  # the launch itself is not tested here
    with pytest.raises(counters.NcuError, match=reason):
        counters.run_under_ncu("norm_forward", 60.0)


def test_without_nsight_compute_the_row_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(counters, "LAUNCHES", {"norm_forward": counters.launch_norm_forward})
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    (row,) = rehearse(counters, tmp_path)
    assert row["skipped"] == "ncu is not installed, or not on PATH"
    assert row["ptx"]["warp instructions"] > 0
    assert row["skipped"] in counters.summarise([row])[1]


# --------------------------------------------------------------------------------------------- profile


def test_part_profile(tmp_path):
    step, kernels = rehearse(profile, tmp_path)
    assert {"attention forward", "attention backward", "norms", "matmul"} <= set(kernels["groups"])
    assert sum(of["share"] for of in kernels["groups"].values()) == pytest.approx(1)
    assert step["launches"] == sum(of["launches"] for of in kernels["groups"].values())
    assert [line.split(" ")[0] for line in profile.summarise([step, kernels])] == ["a", "shares"]
    assert 0 < (tmp_path / step["trace"]).stat().st_size <= 16 * 2**20


def test_kernels_of_a_trace(tmp_path):
    events = [
        dict(ph="X", cat="kernel", name="attention_backward_kv", dur=30),
        dict(ph="X", cat="kernel", name="nvjet_tst_128x256", dur=60),
        dict(ph="X", cat="gpu_memcpy", name="Memcpy DtoH", dur=10),
        dict(ph="X", cat="gpu_user_annotation", name="Optimizer.step", dur=1000),
        dict(ph="X", cat="cpu_op", name="aten::mm", dur=1000),
    ]
    trace = tmp_path / "trace.json.gz"
    with profile.gzip.open(trace, "wt") as file:
        profile.json.dump({"traceEvents": events}, file)
    groups = profile.compute_shares(profile.read_device_events(trace))
    assert {name: of["share"] for name, of in groups.items()} == {
        "matmul": pytest.approx(0.6), "attention backward": pytest.approx(0.3), "copies": pytest.approx(0.1),
    }  # fmt: skip
