"""What this machine can and cannot do for expertmesh, and what to install: the first look when something fails."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "ray", "tokenizers", "safetensors", "fastapi")


class Finding(NamedTuple):
    """One thing looked at. A `needed` one that is not ok stops training or serving."""

    what: str
    ok: bool
    needed: bool
    detail: str


def examine() -> list[Finding]:
    """Look at everything; nothing here raises."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _devices,
        _compiler,
        _limits,
        _collectives,
    )
    findings: list[Finding] = []
    for look in looks:
        try:
            findings.extend(look())
        except Exception as error:  # the doctor must finish the round: what broke is a finding itself
            findings.append(Finding(look.__name__.strip("_"), False, True, f"{type(error).__name__}: {error}"))
    return findings


def _python() -> Iterator[Finding]:
    yield Finding("python", sys.version_info >= (3, 11), True, f"{platform.python_version()} (3.11 or newer)")
    yield Finding("system", sys.platform == "linux", False, f"{platform.platform()}; tried on Linux")


def _packages() -> Iterator[Finding]:
    for package in PACKAGES:
        try:
            yield Finding(package, True, True, version(package))
        except PackageNotFoundError:
            yield Finding(package, False, True, f"not installed: pip install {package}")


def _devices() -> Iterator[Finding]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    detail = ", ".join(gpus) or f"none: gloo on {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    yield Finding("GPUs", bool(gpus), False, detail)


def _compiler() -> Iterator[Finding]:
    import torch

    from expertmesh.parallel.deepspeed_build import build_folder, has_compiler, is_built

    if torch.cuda.is_available():
        return
    built = is_built()
    compiler = "there" if has_compiler() else "missing: install g++ (DeepSpeed then all-reduces through shared memory)"
    yield Finding("C++ compiler", has_compiler(), False, compiler)
    where = f"in {build_folder()}"
    yield Finding("DeepSpeed's CPU operator", built, False, where if built else f"built at first use, {where}")


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("open files", files >= 4096, False, f"{files} (ulimit -n; Ray likes 4096 or more)")
    shared = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    detail = f"{shared.free / 2**30:.1f} GiB free in /dev/shm" if shared else "no /dev/shm"
    yield Finding("shared memory", bool(shared and shared.free > 2**28), False, detail)
    folder = shutil.disk_usage(".")
    yield Finding("disk", folder.free > 2**31, False, f"{folder.free / 2**30:.0f} GiB free here")


def _collectives() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ones = torch.ones(4)
        dist.all_reduce(ones)
        yield Finding("gloo", bool(ones.sum() == 4), True, "a process group formed on loopback")
    finally:
        dist.destroy_process_group()
