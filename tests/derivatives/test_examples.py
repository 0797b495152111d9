"""The training steps of the examples, equal to those on PyTorch's attention in its own operations; and the scripts."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashattn
from examples import gradient_penalty, meanflow
from examples.trajectories import Transformer, sample_trajectories


def penalise(model, data, noise):
    return gradient_penalty.compute_loss(model, data, noise, torch.linspace(0, 1, len(data)).to(data))


def flow(model, data, noise, stop=True):
    times = torch.linspace(0.1, 0.9, 2 * len(data)).view(2, -1).T.to(data)
    return meanflow.compute_loss(model, data, noise, times, stop)


STEPS = {
    "gradient_penalty": (penalise, dict(conditions=0, results=1)),
    "meanflow": (flow, dict(conditions=2, results=3)),
    "meanflow_through_the_jvp": (lambda *x: flow(*x, stop=False), dict(conditions=2, results=3)),
}


def take_step(compute_loss, model, dtype):
    data = sample_trajectories(4).to(dtype)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    loss = compute_loss(model, data, noise)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_pytorchs_attention(name, dtype):
    compute_loss, options = STEPS[name]
    torch.manual_seed(0)
    ours = Transformer(**options).to(dtype)
    theirs = Transformer(**options, attention=torch.nn.MultiheadAttention).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    loss, gradients = take_step(compute_loss, ours, dtype)
    with sdpa_kernel(SDPBackend.MATH), flashattn.use_backend("reference"):
        expected_loss, expected = take_step(compute_loss, theirs, dtype)
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(loss, expected_loss, **tolerance)
    torch.testing.assert_close(gradients, expected, **tolerance)


@pytest.mark.parametrize("name", ["gradient_penalty", "meanflow"])
def test_scripts(name):
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", "--steps", "2"], capture_output=True, text=True, check=True
    )
    assert "step    1" in done.stdout
