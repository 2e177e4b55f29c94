"""Settings of the test run itself (Triton kernels run in Triton's interpreter, nothing leaves this machine), and a run
that tests of commands begin with."""

import os
import signal
from pathlib import Path
from typing import Any

# Before anything imports triton: the same kernels, executed on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import memory_bounds
import pytest
import torch
from commands import TINY_RECIPE, expertmesh_json

# Tests are small: threads that wait for each other cost more than they bring, above all where ranks are threads too.
torch.set_num_threads(1)

memory_bounds.watch()

# A run in the background of a shell ignores Ctrl-C, and so would each command that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def drawn_anew() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user works."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    (folder / "short.txt").write_text("too short to train on\n" * 20)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    """The result of a small run there."""
    return expertmesh_json("train", "tiny.yaml", folder=folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Test processes side by side know a test by its id: of two with the same only one would run."""
    assert len({item.nodeid for item in items}) == len(items), "two tests have the same id"
