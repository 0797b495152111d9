"""MeanFlow learns the average velocity u from time r to t, by which noise becomes a trajectory in one step. It has to
satisfy u = v - (t - r) du/dt, with a derivative of the model along (v, 0, 1): a jvp through attention and norms, inside
of what the gradients of the parameters are taken of. Geng et al., "Mean Flows for One-step Generative Modeling" (2025),
arXiv:2505.13447.

    python -m examples.meanflow --steps 400
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from .trajectories import Transformer, sample_trajectories


def compute_loss(model: torch.nn.Module, data: Tensor, noise: Tensor, times: Tensor, stop: bool = True) -> Tensor:
    """The mean square of u(z, r, t) - (v - (t - r) du/dt), of z = (1 - t) data + t noise and v = noise - data.

    times: (batch, 2), r and t of each in any order. stop: the paper takes the derivative of u for a constant.
    """
    r, t = times.sort(-1).values.unbind(-1)
    wide = t[:, None, None]
    z, v = (1 - wide) * data + wide * noise, noise - data
    u, change = torch.func.jvp(model, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    target = v - (t - r)[:, None, None] * change
    return (u - (target.detach() if stop else target)).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model, data = Transformer(conditions=2, results=3), sample_trajectories(512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = data[torch.randint(len(data), (32,))]
        loss = compute_loss(model, batch, torch.randn_like(batch), torch.rand(32, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
