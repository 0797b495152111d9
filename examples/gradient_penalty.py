"""A critic with a gradient penalty: it tells trajectories from noise, and its gradient by its input is held near length
1, so that its score is a distance. The penalty is a function of a gradient, so training it takes a second derivative
through attention and norms. Gulrajani et al., "Improved Training of Wasserstein GANs" (2017), arXiv:1704.00028.

    python -m examples.gradient_penalty --steps 150
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from .trajectories import Transformer, sample_trajectories


def measure_slopes(critic: torch.nn.Module, x: Tensor) -> Tensor:
    """(batch,): the length of the gradient of each trajectory's score by it, differentiable."""
    x = x.detach().requires_grad_()
    score = critic(x).mean((1, 2))
    (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def compute_loss(critic: torch.nn.Module, real: Tensor, fake: Tensor, mix: Tensor, weight: float = 10.0) -> Tensor:
    """E[critic(fake)] - E[critic(real)] + weight E[(slope - 1)^2] at points between the two; mix: (batch,), 0 to 1."""
    distance = critic(fake).mean() - critic(real).mean()
    between = torch.lerp(real, fake, mix[:, None, None])
    return distance + weight * (measure_slopes(critic, between) - 1).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    critic, data = Transformer(conditions=0, results=1), sample_trajectories(512)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for step in range(steps):
        real = data[torch.randint(len(data), (32,))]
        fake = torch.randn_like(real)
        loss = compute_loss(critic, real, fake, torch.rand(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            slopes = measure_slopes(critic, torch.lerp(real, fake, 0.5))
            distance = critic(real).mean() - critic(fake).mean()
            print(f"step {step:4d}  distance {distance.item():6.2f}  slope {slopes.mean().item():.2f}")


if __name__ == "__main__":
    main()
