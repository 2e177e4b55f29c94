"""Settings of the test run itself: Triton kernels run in Triton's interpreter, nothing leaves this machine."""

import os

# Before anything imports triton: the same kernels, executed on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import memory_bounds
import pytest
import torch

# Tests are small: threads that wait for each other cost more than they bring, above all where ranks are threads too.
torch.set_num_threads(1)

memory_bounds.watch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Test processes side by side know a test by its id: of two with the same only one would run."""
    assert len({item.nodeid for item in items}) == len(items), "two tests have the same id"
