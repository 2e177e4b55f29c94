"""DeepSpeed and Megatron-Core as a worker imports them, without what takes longest of it.

Both hand functions to torch.compile where they define them (Megatron its fused activations, DeepSpeed its Muon), and
that imports torch's compiler: 3 of the 9 seconds until a worker can train. Nothing of ours calls those functions.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from expertmesh.parallel.deepspeed_build import prepare_build


def import_engines() -> None:
    """Import all that building an engine would, in a process of ours: in one of a user's, who may run what we leave
    as it is written, the libraries are imported as they come.
    """
    prepare_build()
    with mock.patch.object(torch, "compile", _as_written):
        import_module("deepspeed.runtime.zero.muon.original_muon")
        import_module("megatron.core")
    import_module("torch._dynamo")  # the first optimizer asks for it


def _as_written(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """In place of torch.compile, called with a function or to make a decorator."""
    return function if function is not None else lambda decorated: decorated
