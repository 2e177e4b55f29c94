"""Settings of the test run itself: Triton kernels run in Triton's interpreter, nothing leaves this machine."""

import os

# Before anything imports triton: the same kernels, executed on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import memory_bounds
import torch

# Tests are small: threads that wait for each other cost more than they bring, above all where ranks are threads too.
torch.set_num_threads(1)

memory_bounds.watch()
