"""Mixture of experts: feed-forwards of which each token uses a few.

Shazeer et al., "Outrageously Large Neural Networks" (2017), arXiv:1701.06538; the variant of OpenAI's gpt-oss (2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import Config


class Experts(nn.Module):
    """The router's `experts_per_token` largest logits choose the experts, and a softmax over these logits weights them.
    An expert is down((up + 1) * gate * sigmoid(alpha * gate)), with gate and up clamped; gates and ups alternate."""

    def __init__(self, config: Config):
        super().__init__()
        count, width, hidden = config.experts, config.width, config.ffn_width
        self.active, self.alpha, self.limit = config.experts_per_token, config.swiglu_alpha, config.swiglu_limit
        self.router = nn.Linear(width, count)
        self.gate_up = nn.Parameter(torch.randn(count, width, 2 * hidden) * width**-0.5)
        self.gate_up_bias = nn.Parameter(torch.zeros(count, 2 * hidden))
        self.down = nn.Parameter(torch.randn(count, hidden, width) * hidden**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(count, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        best = self.router(tokens).topk(self.active, dim=-1)
        weights = best.values.softmax(-1)
        out = torch.zeros_like(tokens)
        for expert in best.indices.unique().tolist():
            token, rank = (best.indices == expert).nonzero(as_tuple=True)  # rank: among the token's experts
            y = self.apply_expert(tokens[token], expert) * weights[token, rank, None]
            out = out.index_add(0, token, y.to(out.dtype))  # `token` has no number twice
        return out.view_as(x)

    def apply_expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = (x @ self.gate_up[expert] + self.gate_up_bias[expert]).unflatten(-1, (-1, 2)).unbind(-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate) @ self.down[expert] + self.down_bias[expert]
