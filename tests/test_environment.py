"""The variables of torchrun and of Slurm say which rank a process is; what they cannot be is told in a line."""

from __future__ import annotations

import pytest

from expertmesh.launch.environment import Seat, first_host, read_seat

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}
OMP = {"OMP_NUM_THREADS": "4"}

SEATS = [
    ("torchrun", TORCHRUN | OMP, Seat(5, 8, 1, "node7", 29500)),
    (
        "torchrun's second attempt",
        TORCHRUN | OMP | {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        Seat(5, 8, 1, "node7", 29500, attempt=1, agent_listens=True),
    ),
    ("one host", TORCHRUN | OMP | {"MASTER_ADDR": "localhost"}, Seat(5, 8, 1, "127.0.0.1", 29500)),
    ("torchrun within a job of Slurm", SLURM | TORCHRUN | OMP, Seat(5, 8, 1, "node7", 29500)),
    ("Slurm", SLURM, Seat(5, 8, 1, "gpu07", 19567, threads=1)),
    ("Slurm with cores", SLURM | {"SLURM_CPUS_PER_TASK": "6"}, Seat(5, 8, 1, "gpu07", 19567, threads=6)),
    ("a step on other nodes", SLURM | OMP | {"SLURM_STEP_NODELIST": "gpu08"}, Seat(5, 8, 1, "gpu08", 19567)),
    (
        "a script that says where to meet",
        SLURM | OMP | {"MASTER_ADDR": "ib7", "MASTER_PORT": "4000"},
        Seat(5, 8, 1, "ib7", 4000),
    ),
]


@pytest.mark.parametrize("variables, seat", [row[1:] for row in SEATS], ids=[row[0] for row in SEATS])
def test_who_this_process_is(variables, seat):
    assert read_seat(variables, 8) == seat


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


WRONG = [
    (
        "nobody started it",
        {},
        "neither torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) nor",
    ),
    ("half of torchrun's", without(TORCHRUN, "LOCAL_RANK", "MASTER_PORT"), "LOCAL_RANK, MASTER_PORT of torchrun's"),
    ("half of Slurm's", without(SLURM, "SLURM_NTASKS"), "SLURM_NTASKS of srun's variables not set"),
    ("no number", TORCHRUN | {"WORLD_SIZE": "all"}, "WORLD_SIZE=all: a number is needed"),
    ("another size", TORCHRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4: the recipe's parallel section makes 8 workers"),
    ("another size in Slurm", SLURM | {"SLURM_NTASKS": "9"}, "SLURM_NTASKS=9: the recipe's parallel section makes 8"),
]


@pytest.mark.parametrize("variables, told", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_cannot_be_is_told(variables, told):
    with pytest.raises(ValueError) as error:
        read_seat(variables, 8)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("login", "login"),
        ("a1,a2", "a1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("gpu[9,11-12]", "gpu9"),
        ("rack[1-2]-node[04,06]-ib,x", "rack1-node04-ib"),
    ],
)
def test_the_first_of_a_node_list(nodes, host):
    assert first_host(nodes) == host
