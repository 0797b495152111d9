"""Training: what a step is, and that a run killed at any moment goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model
from model import heads
from model.io.checkpoints import CheckpointError
from model.io.tokenizer import Tokenizer
from model.training import runs, train
from model.training.batches import Batch
from model.training.runs import Run
from model.training.train import Training
from tests.model.training import CONFIG, is_equal, make_batch, make_model


def test_it_learns(tmp_path):
    log = train.train(make_model(), make_batch, Training(steps=60, learning_rate=1e-2, warmup=10), progress=False)
    losses = [entry["loss"] for entry in log]
    assert losses[0] > 3
    assert losses[-1] < 0.2


def test_batches_of_a_step_count_by_their_targets():
    """Three batches of 3, 25 and 9 targets are one batch of 37, which a mean of their means is not."""
    sizes = ((3,), (25,), (9,))
    parts = [make_batch(i, lengths) for i, lengths in enumerate(sizes)]
    whole = Batch(
        dict(tokens=torch.cat([p.inputs["tokens"] for p in parts]), lengths=torch.tensor([3, 25, 9])),
        torch.cat([p.targets for p in parts]),
    )
    a, b = make_model(), make_model()
    log_a = train.train(a, parts.__getitem__, Training(steps=1, accumulate=3, clip=None), progress=False)
    log_b = train.train(b, lambda i: whole, Training(steps=1, clip=None), progress=False)
    assert abs(log_a[0]["loss"] - log_b[0]["loss"]) < 1e-5
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6, msg=name)


def make_batch_without_targets(number):
    """A batch none of whose targets counts."""
    tokens, targets = make_batch(number)
    return Batch(tokens, torch.full_like(targets, -100))


def test_a_batch_without_targets_adds_nothing():
    """Beside others in a step, whose mean it leaves as it was."""
    a, b = make_model(), make_model()
    log_a = train.train(
        a,
        lambda i: make_batch_without_targets(i) if i % 2 else make_batch(i // 2),
        Training(steps=3, accumulate=2),
        progress=False,
    )
    log_b = train.train(b, make_batch, Training(steps=3), progress=False)
    assert [e["loss"] for e in log_a] == [e["loss"] for e in log_b]
    assert is_equal(a, b)


def test_a_step_without_targets_changes_nothing():
    """Neither weights, by their decay or momentum, nor what comes after; its loss is 0."""
    a = make_model()
    train.train(a, make_batch, Training(steps=1, schedule="constant"), progress=False)
    b = make_model()
    log = train.train(
        b, lambda i: make_batch_without_targets(i) if i else make_batch(i), Training(steps=3), progress=False
    )
    assert [entry["loss"] for entry in log][1:] == [0, 0]
    assert is_equal(a, b)


def test_recomputing_changes_no_bit():
    """With dropout, which has to drop the same elements again."""
    a, b = make_model(dropout=0.2), make_model(dropout=0.2)
    train.train(a, make_batch, Training(steps=3), progress=False)
    train.train(b, make_batch, Training(steps=3, recompute=True), progress=False)
    assert is_equal(a, b)


def test_gradients_are_clipped():
    ours = make_model()
    seen = []
    ours.token_embedding.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    train.train(ours, make_batch, Training(steps=1, clip=0.01), progress=False)
    norm = torch.cat([p.grad.flatten() for p in ours.parameters()]).norm().item()
    assert seen[0] > 0.1
    assert abs(norm - 0.01) < 1e-5


def test_bfloat16_learns_as_float32():
    losses = {}
    for bfloat16 in (False, True):
        settings = Training(steps=40, learning_rate=1e-2, warmup=10, bfloat16=bfloat16)
        losses[bfloat16] = train.train(make_model(), make_batch, settings, progress=False)[-1]["loss"]
    assert losses[True] < 1
    assert abs(losses[True] - losses[False]) < 0.2


def test_weight_decay_is_of_matrices():
    optimizer = train.make_optimizer(make_model(), Training(steps=1, weight_decay=0.3))
    decays = {group["weight_decay"]: {p.dim() for p in group["params"]} for group in optimizer.param_groups}
    assert decays == {0.3: {2}, 0.0: {1}}


def test_schedules():
    """Attention Is All You Need, equation 3: width^-0.5 * min(step^-0.5, step * warmup^-1.5)."""
    settings = Training(steps=100, learning_rate=512**-0.5 * 40**-0.5, warmup=40, schedule="inverse_sqrt")
    for step in (1, 39, 40, 41, 100):
        expected = 512**-0.5 * min(step**-0.5, step * 40**-1.5)
        assert abs(settings.lr_at(step - 1) - expected) < 1e-12
    constant = Training(steps=10, learning_rate=2.0, warmup=0, schedule="constant")
    assert {constant.lr_at(step) for step in range(10)} == {2.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("accumulate", 0), ("warmup", -1), ("schedule", "linear"), ("label_smoothing", 1.0),
        ("evaluate_every", 0), ("save_every", -1), ("clip", 0.0), ("clip", -1.0), ("min_lr_ratio", -0.1),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Training(**{"steps": 1, name: value})


def test_label_smoothing():
    """Szegedy et al. (2016): the target is smoothed with the uniform distribution."""
    logits, targets = torch.randn(5, 31), torch.tensor([3, -100, 7, 30, 0])
    logs = logits.log_softmax(-1)
    expected = torch.stack([-0.9 * logs[i, t] - 0.1 * logs[i].mean() for i, t in enumerate(targets) if t >= 0]).mean()
    torch.testing.assert_close(heads.compute_loss(CONFIG, logits, targets, 0.1), expected)


def test_label_smoothing_of_answers():
    config = replace(CONFIG, lm_head=False, task="answer")
    logits, targets = torch.randn(3, 7, 2), torch.tensor([[1, 4], [-100, 2], [0, -100]])
    logs = logits.log_softmax(1)
    each = [-0.9 * logs[i, t, side] - 0.1 * logs[i, :, side].mean()
            for i, row in enumerate(targets) for side, t in enumerate(row) if t >= 0]  # fmt: skip
    torch.testing.assert_close(heads.compute_loss(config, logits, targets, 0.1), torch.stack(each).mean())


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_label_smoothing_of_what_has_no_classes_is_refused(problem_type):
    config = replace(CONFIG, lm_head=False, task="classify", labels=("a",), problem_type=problem_type)
    with pytest.raises(ValueError, match=f"label_smoothing must be 0 for problem_type '{problem_type}', got 0.1"):
        heads.compute_loss(config, torch.zeros(3, 1), torch.zeros(3, 1), 0.1)


def test_targets_of_several_labels_that_do_not_count():
    config = replace(
        CONFIG, lm_head=False, task="classify", labels=("a", "b"), problem_type="multi_label_classification"
    )
    logits, targets = torch.randn(2, 2), torch.tensor([[1, -100], [0, 1]])
    each = torch.stack([-logits[0, 0].sigmoid().log(), -(-logits[1, 0]).sigmoid().log(), -logits[1, 1].sigmoid().log()])
    torch.testing.assert_close(heads.compute_loss(config, logits, targets), each.mean())


def test_a_number_of_minus_100_counts():
    config = replace(
        CONFIG, causal=False, lm_head=False, task="classify", labels=("celsius",), problem_type="regression"
    )
    torch.manual_seed(0)
    ours = model.Transformer(config)
    with torch.no_grad():
        expected = (ours(torch.tensor([[1, 2]])) + 100).square().item()
    log = train.train(
        ours, lambda i: Batch(dict(tokens=torch.tensor([[1, 2]])), torch.tensor([-100.0])), Training(steps=1),
        progress=False,
    )  # fmt: skip
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops(tmp_path):
    ours = make_model()
    run = Run(tmp_path)
    train.train(ours, make_batch, Training(steps=2), run, progress=False)
    with torch.no_grad():
        ours.norm.weight.fill_(float("nan"))
    before = (tmp_path / "step-000002" / "training.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        train.train(ours, make_batch, Training(steps=9), progress=False)
    assert (tmp_path / "step-000002" / "training.pt").read_bytes() == before


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    """Bits of weights, optimizer, log and dropout."""
    whole = make_model(dropout=0.1)
    log = train.train(whole, make_batch, Training(steps=12, schedule="constant"), progress=False)
    for steps in (5, 12):
        again = make_model(dropout=0.1)
        again_log = train.train(
            again, make_batch, Training(steps=steps, schedule="constant", save_every=2), Run(tmp_path), progress=False
        )
    assert is_equal(whole, again)
    assert [e["loss"] for e in log] == [e["loss"] for e in again_log]
    assert [p.name for p in Run(tmp_path).checkpoints] == ["step-000010", "step-000012"]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [*range(1, 13)]
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert is_equal(model.load(tmp_path / "step-000012")[0], whole)


def test_the_log_grows_with_each_step(tmp_path):
    """And loses what came after the checkpoint that a run goes on from."""

    def until_seven(i):
        if i == 7:
            raise KeyboardInterrupt
        return make_batch(i)

    def steps():
        return [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    with pytest.raises(KeyboardInterrupt):
        train.train(make_model(), until_seven, Training(steps=9, save_every=5), Run(tmp_path), progress=False)
    assert steps() == [*range(1, 8)]
    train.train(make_model(), make_batch, Training(steps=9), Run(tmp_path), progress=False)
    assert steps() == [*range(1, 10)]


SCRIPT = """
import sys; sys.path[:0] = {paths}
from model.training import train
from tests.model.training import make_batch, make_model
settings = train.Training(steps=100_000, save_every=1, schedule="constant")
train.train(make_model(dropout=0.1), make_batch, settings, train.Run({run!r}), progress=False)
"""


def test_killed_at_any_moment(tmp_path):
    """While it writes, most of the time: every checkpoint that is there is whole, and it goes on from it."""
    paths = [str(Path(__file__).parents[2])]
    script = SCRIPT.format(paths=paths, run=str(tmp_path / "run"))
    reached = 0
    for delay in (0.0, 0.006, 0.02):
        child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while find_newest(tmp_path / "run") < reached + 2 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        errors = child.communicate()[1].decode()
        assert child.returncode == -signal.SIGKILL, errors
        assert find_newest(tmp_path / "run") >= reached + 2
        reached = find_newest(tmp_path / "run")
        for path in Run(tmp_path / "run").checkpoints:
            model.load(path)
            assert torch.load(path / "training.pt", weights_only=True)["step"] == int(path.name.split("-")[1])
    whole, again = make_model(dropout=0.1), make_model(dropout=0.1)
    settings = Training(steps=reached + 1, schedule="constant")
    train.train(whole, make_batch, settings, progress=False)
    train.train(again, make_batch, settings, Run(tmp_path / "run"), progress=False)
    assert is_equal(whole, again)


def test_stopped_while_it_deletes(tmp_path, monkeypatch):
    """A half-deleted checkpoint does not count, and the next save removes it."""

    def stopped(path):
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else stopped(path))
        with pytest.raises(KeyboardInterrupt):
            train.train(make_model(), make_batch, Training(steps=5, save_every=1), Run(tmp_path), progress=False)
    assert [path.name for path in Run(tmp_path).checkpoints] == ["step-000002", "step-000003"]
    for path in Run(tmp_path).checkpoints:
        model.load(path)
    train.train(make_model(), make_batch, Training(steps=5, save_every=1), Run(tmp_path), progress=False)
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "loss.png", "step-000004", "step-000005"]


def find_newest(run):
    return max((int(path.name.split("-")[1]) for path in Run(run).checkpoints), default=0)


def test_a_state_that_is_cut_off(tmp_path):
    train.train(make_model(), make_batch, Training(steps=1), Run(tmp_path), progress=False)
    file = tmp_path / "step-000001" / "training.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"training\.pt: not a state of this model"):
        train.train(make_model(), make_batch, Training(steps=2), Run(tmp_path), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(width=64, head_dim=16), r"begun with width 32 \(here 64\), head_dim 8 \(here 16\)"),
        (dict(heads=2, kv_heads=2, head_dim=16), r"heads 4 \(here 2\), kv_heads 4 \(here 2\), head_dim 8 \(here 16\)"),
        (dict(norm_eps=1e-6), r"norm_eps 1e-05 \(here 1e-06\)"),
    ],
)
def test_a_run_does_not_go_on_as_another_model(changes, message, tmp_path):
    """Nor as one whose weights have the same shapes. Dropout may change, as settings of the training may."""
    train.train(make_model(), make_batch, Training(steps=1), Run(tmp_path), progress=False)
    with pytest.raises(CheckpointError, match=message):
        train.train(make_model(**changes), make_batch, Training(steps=2), Run(tmp_path), progress=False)
    train.train(make_model(dropout=0.1), make_batch, Training(steps=2), Run(tmp_path), progress=False)


def test_a_run_does_not_go_on_with_another_tokeniser(tmp_path):
    a, b, again = (Tokenizer.train(text, 260) for text in ("owl owl owl sea", "pussycat in a boat", "owl owl owl sea"))
    options = dict(progress=False)
    train.train(make_model(), make_batch, Training(steps=1), Run(tmp_path), tokenizer=a, **options)
    with pytest.raises(CheckpointError, match="step-000001: begun with another tokeniser"):
        train.train(make_model(), make_batch, Training(steps=2), Run(tmp_path), tokenizer=b, **options)
    train.train(make_model(), make_batch, Training(steps=2), Run(tmp_path), tokenizer=again, **options)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    import resource

    train.train(make_model(), make_batch, Training(steps=1), Run(tmp_path), progress=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="not written"):
            train.train(make_model(), make_batch, Training(steps=2), Run(tmp_path), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "loss.png", "step-000001"]
    train.train(make_model(), make_batch, Training(steps=2), Run(tmp_path), progress=False)
