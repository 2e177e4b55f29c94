"""DeepSpeed's one C++ build on a CPU, made safe: it takes a minute once, and a killed build must not hang the next.

torch's extension builder guards its folder with a plain lock file. Whoever is killed while building leaves it behind,
and every later process waits for it for ever. Here the folder is ours alone and the build happens under a lock that
the kernel releases with the process, so a lock file found inside is stale by proof.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SHM_OP = "deepspeed_shm_comm"  # all-reduce through shared memory, for ranks on one CPU host; optional


def build_folder() -> Path:
    """Where compiled operators are kept: a folder for each environment, and pair of torch and DeepSpeed in it.

    The compiler is told paths of the environment, so two that shared a folder would build anew at every turn.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    versions = f"torch-{torch.__version__}-deepspeed-{version('deepspeed')}"
    return cache / "expertmesh" / "torch_extensions" / f"{versions}-{environment}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "expertmesh.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_built() -> bool:
    """Whether the operator is there, or none is needed (a GPU does without it)."""
    return torch.cuda.is_available() or any(build_folder().glob(f"**/{SHM_OP}.so"))


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def prepare_build() -> None:
    """Build DeepSpeed's CPU operator, or find it built. Without a C++ compiler it is left out: gloo serves instead."""
    folder = build_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    scripts = str(Path(sys.executable).parent)  # ninja comes with our environment, which PATH need not name
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ["PATH"]
    if torch.cuda.is_available():
        return
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if not has_compiler():
        log.warning("no C++ compiler: DeepSpeed runs without its shared-memory all-reduce (install g++ to have it)")
        deepspeed.ops.__compatible_ops__[SHM_OP] = False
        return
    with _locked(folder):
        for stale in folder.glob("**/lock"):
            stale.unlink()
        if not is_built():
            log.info("building DeepSpeed's CPU operator: once, about a minute")
        with redirect_stdout(sys.stderr):
            get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
