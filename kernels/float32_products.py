"""Which library multiplies float32 matrices on the CPU: oneDNN where that is exact, else torch's own choice.

torch.mm takes MKL for float32. On AMD that reaches 0.7 to 0.85 of what oneDNN does on the same cores (0.45 where the
cores have 512-bit units). torch hands float32 to oneDNN only if it may round to bfloat16 inside; whether it does hangs
on the machine: matrix units (AMX) do, vector units do not. So permission is given where the answers stay float32, and
only around our own products.

The choice must fall alike in every process of a run and in the run that takes it up again, or one step would give
other bits. Hence it goes by exactness, which does not change from one call to the next, and by time only in so far as a
library that takes twice as long is refused.
"""

from __future__ import annotations

import time
from functools import cache
from threading import Lock
from types import TracebackType

import torch

EXACT = 1e-5  # largest error over the largest magnitude: float32 sums of 512 give 1e-6, products of bfloat16 2e-3
REFUSED = 2.0  # times as slow as torch's choice; a busy machine does not make that of the least of `TRIES`
TRIES = 7
ROWS, INNER, COLUMNS = 64, 512, 512  # 34 MFLOP: 0.3 ms


class _Permission:
    """Lets oneDNN take float32 products while it is held. Held by several threads, the last one gives it back."""

    def __init__(self) -> None:
        self._lock, self._holders, self._before = Lock(), 0, ""

    def __enter__(self) -> None:
        with self._lock:
            if not self._holders:
                self._before = torch.backends.mkldnn.matmul.fp32_precision
                torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            self._holders += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                torch.backends.mkldnn.matmul.fp32_precision = self._before


class _AsTorchChooses:
    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


ONEDNN, AS_TORCH_CHOOSES = _Permission(), _AsTorchChooses()


@cache
def float32_products() -> _Permission | _AsTorchChooses:
    """What to hold around float32 products on the CPU: `with float32_products(): torch.mm(...)`. 5 ms at first use."""
    try:
        return ONEDNN if is_exact(ONEDNN) and not is_refused(ONEDNN) else AS_TORCH_CHOOSES
    except (AttributeError, RuntimeError):  # a torch without the setting, or that does not let it be set
        return AS_TORCH_CHOOSES


def products_of(dtype: torch.dtype) -> _Permission | _AsTorchChooses:
    """`float32_products` for float32; torch itself gives bfloat16 to oneDNN, and nobody has another float64."""
    return float32_products() if dtype is torch.float32 else AS_TORCH_CHOOSES


def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, INNER, generator=generator), torch.randn(INNER, COLUMNS, generator=generator)


def is_exact(library: _Permission | _AsTorchChooses) -> bool:
    """Whether float32 products stay float32 by `library`."""
    left, right = _operands()
    exact = left.double() @ right.double()
    with library:
        error = (torch.mm(left, right) - exact).abs().max() / exact.abs().max()
    return bool(error < EXACT)


def is_refused(library: _Permission | _AsTorchChooses) -> bool:
    """Whether `library` is hopelessly slow beside torch's choice."""
    left, right = _operands()
    out = torch.empty(ROWS, COLUMNS)

    def seconds(held: _Permission | _AsTorchChooses) -> float:
        with held:
            start = time.perf_counter()
            torch.mm(left, right, out=out)
            return time.perf_counter() - start

    taken = [(seconds(library), seconds(AS_TORCH_CHOOSES)) for _ in range(TRIES)]  # in turn
    own, other = (min(column) for column in zip(*taken, strict=True))
    return own > REFUSED * other
