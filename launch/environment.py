"""Which rank this process is, as whoever started one process a rank says it: torchrun, or Slurm's srun.

torchrun    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (docs.pytorch.org, "torchrun")
srun        SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_JOB_ID and a node list (slurm.schedmd.com, "srun");
            rank 0 is on the first of these nodes
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")
STEP_NODES = "SLURM_STEP_NODELIST"  # of this srun, which may have some of the job's nodes
FIRST_PORT, PORTS = 15000, 10000  # where jobs of Slurm meet: below the ports that systems hand out


class Seat(NamedTuple):
    """One rank, and where all meet."""

    rank: int
    world: int
    local_rank: int  # among those of its host
    host: str  # rank 0's
    port: int
    attempt: int = 0  # how often torchrun has started all ranks anew
    agent_listens: bool = False  # at `port`, instead of rank 0
    threads: int | None = None  # for a process that has chosen none; None: somebody has


def read_seat(environment: Mapping[str, str], world: int) -> Seat:
    """Raises ValueError with one line: what is missing or no number, or that the job has another size than `world`."""
    by_torchrun = "RANK" in environment
    if not by_torchrun and "SLURM_PROCID" not in environment:
        raise ValueError(
            f"cluster.launcher=environment: neither torchrun's variables ({', '.join(TORCHRUN)}) nor Slurm's "
            f"({', '.join(SLURM)}) are set; start it as `torchrun --nproc-per-node {world} --no-python expertmesh "
            f"train ...` or `srun --ntasks {world} expertmesh train ...`"
        )
    names = TORCHRUN if by_torchrun else SLURM
    if missing := [name for name in names if not environment.get(name)]:
        starter = "torchrun" if by_torchrun else "srun"
        raise ValueError(f"cluster.launcher=environment: {', '.join(missing)} of {starter}'s variables not set")
    rank, size, local_rank = (_number(environment, name) for name in names[:3])
    if size != world:
        raise ValueError(
            f"{names[1]}={size}: the recipe's parallel section makes {world} workers; start as many, or change it"
        )
    if by_torchrun:
        host, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")
    else:
        host = environment.get("MASTER_ADDR") or first_host(environment.get(STEP_NODES) or environment[SLURM[-1]])
        own_port = FIRST_PORT + _number(environment, "SLURM_JOB_ID") % PORTS
        port = _number(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else own_port
    return Seat(
        *(rank, size, local_rank),
        host="127.0.0.1" if host == "localhost" else host,
        port=port,
        attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        agent_listens=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        threads=None if "OMP_NUM_THREADS" in environment else int(environment.get("SLURM_CPUS_PER_TASK", 1)),
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdigit():
        raise ValueError(f"{name}={environment[name]}: a number is needed")
    return int(environment[name])


def first_host(nodes: str) -> str:
    """Of a list as Slurm writes it: "gpu[003-007,9],login" begins with gpu003."""
    first = re.match(r"(?:\[[^]]*]|[^,[])*", nodes)
    assert first is not None, "it matches nothing at least"
    return re.sub(r"\[([^],-]*)[^]]*]", r"\1", first[0])
