"""Errors of both kinds: PyTorch raises a RuntimeError for wrong arguments, which its callers catch, and ours are
ValueError and TypeError."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")


class ArgumentValueError(RuntimeError, ValueError):
    """A ValueError that is PyTorch's RuntimeError too."""


class ArgumentTypeError(RuntimeError, TypeError):
    """A TypeError that is PyTorch's RuntimeError too."""


def raise_as_torch(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """Decorator: ValueErrors and TypeErrors are RuntimeErrors too."""

    @functools.wraps(function)
    def call(*args: Inputs.args, **options: Inputs.kwargs) -> Result:
        if torch.compiler.is_dynamo_compiling():  # Dynamo wraps the message in an error of its own
            return function(*args, **options)
        try:
            return function(*args, **options)
        except RuntimeError:
            raise
        except ValueError as error:
            raise ArgumentValueError(str(error)) from error
        except TypeError as error:
            raise ArgumentTypeError(str(error)) from error

    return call
