"""Kernels under Triton's interpreter touch nothing but the tensors they were given, or their launch fails.

A load beyond a tensor's end returns whatever lies there. Where that is not stored, no comparison of results shows that
a mask is missing; on a GPU it can end the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

Spans = tuple[np.ndarray, np.ndarray]  # first byte of each tensor, ascending; the byte after its last


def watch() -> None:
    """From now on each access of a kernel is looked at: all of its addresses must lie within one tensor."""
    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    spans: list[Spans] = []  # of the kernel that runs

    def launched(take: Any) -> Any:
        def taken(self: Any, args: Any, kwargs: Any) -> Any:
            spans[:] = [_spans([*args, *kwargs.values()])]
            return take(self, args, kwargs)

        return taken

    def looked_at(access: Any, mask_at: int) -> Any:
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            pointers, mask = next(a for a in args if _is_pointer(a)), args[mask_at]
            _check(pointers, mask, spans[0])
            return access(self, *args, **kwargs)

        return checked

    grid._init_args_hst = launched(grid._init_args_hst)
    builder.create_masked_load = looked_at(builder.create_masked_load, 1)
    builder.create_masked_store = looked_at(builder.create_masked_store, 2)
    builder.create_atomic_rmw = looked_at(builder.create_atomic_rmw, 3)


def _is_pointer(argument: Any) -> bool:
    return isinstance(argument, interpreter.TensorHandle) and argument.dtype.is_ptr()


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _spans(arguments: Any) -> Spans:
    found = set()
    for tensor in _tensors(arguments):
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            found.add((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    ordered = np.array(sorted(found), dtype=np.uint64).reshape(-1, 2)
    return ordered[:, 0], ordered[:, 1]


def _check(pointers: Any, mask: Any, spans: Spans) -> None:
    addresses, asked = np.broadcast_arrays(pointers.data, mask.data)
    touched = addresses[asked.astype(bool)]
    if not touched.size:
        return
    first, last = touched.min(), touched.max() + pointers.get_element_ty().primitive_bitwidth // 8
    starts, ends = spans
    if not ((starts <= first) & (last <= ends)).any():
        raise IndexError(
            f"bytes {first} to {last} are not of one tensor; there are {list(zip(starts, ends, strict=True))}"
        )
