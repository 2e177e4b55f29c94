"""Where the workers of a job meet: a store that the process which starts them holds open until they are done.

The kernel chooses the port and the store keeps it, so there is no moment at which somebody else could take it.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

WAIT = timedelta(seconds=120)  # for the slowest worker to come


class Rendezvous:
    """A store at `host`:`port`, open as long as this object lives."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=WAIT)

    @property
    def port(self) -> int:
        return self.store.port


def join(host: str, port: int) -> dist.Store:
    """A worker's side of the store at `host`:`port`."""
    if host == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on this machine: stay off its network
    return dist.TCPStore(host, port, is_master=False, timeout=WAIT)
