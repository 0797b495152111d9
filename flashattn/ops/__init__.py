"""The torch.library operators, by subject. Importing this registers them."""

from . import attention, decode, norm  # noqa: F401
