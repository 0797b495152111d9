"""Compares the norm modules with torch.nn's."""

import torch
from torch import nn

import flashattn


def check_layer_norm(options):
    theirs, ours = nn.LayerNorm(63, **options), flashattn.LayerNorm(63, **options)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 63)
    torch.testing.assert_close(ours(x), theirs(x))


def check_rms_norm(options):
    theirs, ours = nn.RMSNorm(63, **options), flashattn.RMSNorm(63, **options)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 63) * 1e-3  # small, so that eps shows
    torch.testing.assert_close(ours(x), theirs(x))
