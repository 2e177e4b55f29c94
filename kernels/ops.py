"""Makes a function an operation that torch knows: opaque to torch.compile, and with an answer for fake tensors.

What an operation does hangs on numbers that its tensors hold (how many rows an expert has), or is a kernel; a tracer
must not look in. Its fake says what comes out, from shapes and dtypes alone: a model's memory can then be counted, or
its graph captured, without computing anything, on devices that are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("expertmesh", "DEF")


def operation(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function with the operation `expertmesh::<schema>`; calls go through torch's dispatcher.

    Args:
        schema: such as "double(Tensor x) -> Tensor". A result may not be None, nor share memory with an argument.
        fake: takes the same arguments, and returns empty tensors like the results.

    Not differentiable by itself: the autograd Functions call it.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"expertmesh::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.expertmesh, name).default

    return register
