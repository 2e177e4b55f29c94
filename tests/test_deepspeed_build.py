"""DeepSpeed's build: what a killed build left behind does not hang the next, and without a compiler it is left out."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.file_baton import FileBaton

from expertmesh.parallel import deepspeed_build
from expertmesh.parallel.deepspeed_build import SHM_OP, build_folder, has_compiler, is_built, prepare_build

WAIT = 20  # seconds; nothing here takes one

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does without the operator")


class Builder:
    """Builds as torch's extension builder does: under a plain lock file, whose owner it waits for without end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loaded = folder / SHM_OP, threading.Event()

    def load(self, verbose: bool) -> None:
        print("compiling")
        self.folder.mkdir(exist_ok=True)
        baton = FileBaton(str(self.folder / "lock"))
        assert baton.try_acquire(), "here torch would wait for a process that is no more"
        (self.folder / f"{SHM_OP}.so").touch()
        baton.release()
        self.loaded.set()


@pytest.fixture
def builder(tmp_path, monkeypatch) -> Builder:
    for name in ("TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(deepspeed_build, "has_compiler", lambda: True)
    folder = build_folder()
    folder.mkdir(parents=True)
    made = Builder(folder)

    assert SHM_OP in deepspeed.ops.__compatible_ops__  # DeepSpeed asks its real builders, once
    monkeypatch.setattr(get_accelerator(), "create_op_builder", {"ShareMemCommBuilder": made}.get)
    return made


def test_builds_once_in_a_folder_of_its_own(builder, tmp_path, capsys):
    assert not is_built()
    prepare_build()
    assert is_built() and builder.loaded.is_set()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(build_folder())
    assert build_folder().is_relative_to(tmp_path / "cache" / "expertmesh")
    assert torch.__version__ in build_folder().name and deepspeed.__version__.split("+")[0] in build_folder().name
    assert capsys.readouterr().out == "", "standard output belongs to --json"


def test_a_lock_file_of_a_killed_build_is_removed(builder):
    for folder in (builder.folder, build_folder() / "another_op"):
        folder.mkdir()
        (folder / "lock").touch()
    prepare_build()
    assert builder.loaded.is_set() and not list(build_folder().glob("**/lock"))


def test_waits_for_a_build_that_lives_and_not_for_one_that_was_killed(builder):
    """The lock of a living builder is the kernel's; it goes with the process, however that ends."""
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
    lock = str(build_folder() / "expertmesh.lock")
    with subprocess.Popen(
        [sys.executable, "-c", hold + "sys.stdin.read()", lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        builder.folder.mkdir()
        (builder.folder / "lock").touch()  # the other's, which is building
        thread = threading.Thread(target=prepare_build, daemon=True)
        thread.start()
        assert not builder.loaded.wait(0.3) and (builder.folder / "lock").exists()
        other.kill()
    assert builder.loaded.wait(WAIT)
    thread.join(WAIT)


def test_without_a_compiler_the_operator_is_left_out(builder, monkeypatch, caplog):
    monkeypatch.setattr(deepspeed_build, "has_compiler", lambda: False)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, SHM_OP, True)
    with caplog.at_level(logging.WARNING):
        prepare_build()
    assert deepspeed.ops.__compatible_ops__[SHM_OP] is False
    assert not builder.loaded.is_set()
    assert "no C++ compiler" in caplog.text and "install g++" in caplog.text


def test_deepspeed_asks_what_we_set(monkeypatch):
    """Should DeepSpeed no longer look there, it would try to build without a compiler."""
    from deepspeed.comm.torch import build_shm_op

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, SHM_OP, False)
    assert build_shm_op() is None


@pytest.mark.parametrize(
    "compiler, found", [(sys.executable, True), ("/nowhere/g++", False)], ids=["named by CXX", "not where CXX says"]
)
def test_has_compiler(monkeypatch, compiler, found):
    monkeypatch.setenv("CXX", compiler)
    assert has_compiler() == found
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert not has_compiler()


def test_ninja_of_this_environment_is_found(builder):
    prepare_build()
    prepare_build()
    scripts = str(Path(sys.executable).parent)
    assert os.environ["PATH"].split(os.pathsep).count(scripts) == 1
