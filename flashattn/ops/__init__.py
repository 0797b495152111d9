"""The torch.library operators, by subject. Importing this registers them."""

from . import attention, attention_derivatives, batching, decode, norm, norm_derivatives  # noqa: F401
