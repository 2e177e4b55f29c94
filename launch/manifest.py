"""A recipe as what other schedulers take: KubeRay, Slurm, SkyPilot. Printed, for a person to look at and to apply.

    kuberay            a RayJob: a head without work of its own, one pod a worker, the recipe in a ConfigMap
    kuberay-service    the same with `expertmesh serve` on the head, which does not end, and a Service before it
    slurm              an sbatch script: Ray on the nodes of the allocation, the job on the first
    skypilot           a task: the same on the nodes that it gets

All of them: token authentication, health checks that notice a hung node in about 10 s (Ray's own take 63 s: seen), no
`ray stop`, which ends every Ray of a host, other people's too. The fields are those of KubeRay's ray.io/v1
(docs.ray.io, "KubeRay CRD API reference", v1.6.2) and of SkyPilot's task YAML (docs.skypilot.co, "Distributed
Multi-Node Jobs"). Nothing here was run on such a cluster; tests check the structure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from expertmesh.launch.local_cluster import HEALTH
from expertmesh.launch.recipe import Recipe

ENVIRONMENT = {"RAY_health_check_initial_delay_ms": "5000", **HEALTH, "RAY_USAGE_STATS_ENABLED": "0"}
GCS_PORT = 6399  # not Ray's 6379: a shared host may have one there, and SkyPilot's own is at 6380
DOOR_PORT = 8000
RECIPE_FOLDER = "/etc/expertmesh"


@dataclass(frozen=True)
class Place:
    """What a recipe does not say about where it runs."""

    image: str  # of a container with expertmesh installed
    storage: str  # a folder that all nodes see: runs and data
    claim: str  # the PersistentVolumeClaim behind it, on Kubernetes
    gpus: int = 0  # of each worker
    memory: str = "8Gi"  # of each pod
    attention: int = 1  # workers, when serving
    ffn: int = 1


def manifest(recipe: Recipe, target: str, place: Place) -> str:
    """The text for `target`. Raises ValueError for one that is not known."""
    writers: dict[str, Callable[[Recipe, Place], str]] = {
        "kuberay": _kuberay,
        "kuberay-service": _kuberay_service,
        "slurm": _slurm,
        "skypilot": _skypilot,
    }
    if target not in writers:
        raise ValueError(f"--for {target}: supported: {', '.join(writers)}")
    return writers[target](recipe, place)


def recipe_there(recipe: Recipe, place: Place) -> str:
    """The recipe as YAML, with its run on the shared storage and its cluster the one that it finds itself on."""
    content = recipe.model_dump(mode="json", exclude={"model"} if recipe.start_from else None)
    content["run_dir"] = _run_dir(recipe, place)
    content["cluster"] |= {"launcher": "ray", "address": "auto"}
    return yaml.safe_dump(content, sort_keys=False)


def _run_dir(recipe: Recipe, place: Place) -> str:
    return f"{place.storage}/runs/{recipe.name}"


def _cpus(recipe: Recipe) -> int:
    return recipe.cluster.cpus_per_worker or 1


def _label(name: str) -> str:
    """A name as Kubernetes has those of services, which KubeRay makes of it (RFC 1035): a letter comes first."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (label if label[:1].isalpha() else f"run-{label}")[:40].strip("-")


# Kubernetes.


def _kuberay(recipe: Recipe, place: Place) -> str:
    name = _label(recipe.name)
    groups = [_group("trainer", recipe.processes, _cpus(recipe), place)]
    command = f"expertmesh train {RECIPE_FOLDER}/recipe.yaml --result-in-log"
    job = _ray_job(name, command, groups, place)
    job["spec"] |= {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 600, "backoffLimit": 2}
    return _documents(_config_map(name, recipe, place), job)


def _kuberay_service(recipe: Recipe, place: Place) -> str:
    name = f"{_label(recipe.name)}-serve"
    groups = [_group("attention", place.attention, 1, place), _group("ffn", place.ffn, 1, place)]
    command = (
        f"expertmesh serve {_run_dir(recipe, place)} --attention {place.attention} --ffn {place.ffn} --address auto "
        f"--host 0.0.0.0 --port {DOOR_PORT} --model-name {recipe.name}"
    )
    job = _ray_job(name, command, groups, place, ports=[{"name": "door", "containerPort": DOOR_PORT}])
    door = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "selector": {"expertmesh/job": name, "expertmesh/pool": "head"},
            "ports": [{"name": "door", "port": DOOR_PORT, "targetPort": DOOR_PORT}],
        },
    }
    return _documents(_config_map(name, recipe, place), job, door)


def _ray_job(
    name: str, command: str, groups: list[dict[str, Any]], place: Place, ports: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    head = _pod("head", name, place, cpus=1, gpus=0, ports=ports or [])
    for group in groups:
        group["template"] = _pod(group["groupName"], name, place, group.pop("cpus"), place.gpus, [])
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": command,  # no entrypointNumCpus: one that cannot be met waits for ever (ray#55133)
            "submissionMode": "HTTPMode",
            "rayClusterSpec": {
                "authOptions": {"mode": "token"},
                "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head},
                "workerGroupSpecs": groups,
            },
        },
    }


def _group(pool: str, workers: int, cpus: int, place: Place) -> dict[str, Any]:
    """One pod a worker: what Kubernetes replaces is then what a job lost."""
    return {
        "groupName": pool,
        "replicas": workers,
        "minReplicas": workers,
        "maxReplicas": workers,
        "labels": {"pool": pool},
        "rayStartParams": {},
        "cpus": cpus,
    }


def _pod(pool: str, name: str, place: Place, cpus: int, gpus: int, ports: list[dict[str, Any]]) -> dict[str, Any]:
    amounts = {"cpu": str(cpus), "memory": place.memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    container: dict[str, Any] = {
        "name": f"ray-{'head' if pool == 'head' else 'worker'}",
        "image": place.image,
        "env": [{"name": key, "value": value} for key, value in ENVIRONMENT.items()],
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "volumeMounts": [
            {"name": "storage", "mountPath": place.storage},
            {"name": "recipe", "mountPath": RECIPE_FOLDER},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if ports:
        container["ports"] = ports
    return {
        "metadata": {"labels": {"expertmesh/job": name, "expertmesh/pool": pool}},
        "spec": {
            "terminationGracePeriodSeconds": 120,
            "containers": [container],
            "volumes": [
                {"name": "storage", "persistentVolumeClaim": {"claimName": place.claim}},
                {"name": "recipe", "configMap": {"name": f"{name}-recipe"}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        },
    }


def _config_map(name: str, recipe: Recipe, place: Place) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe"},
        "data": {"recipe.yaml": _Literal(recipe_there(recipe, place))},
    }


def _documents(*documents: dict[str, Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)


# Hosts with a shell.

_EXPORTS = "\n".join(f"export {key}={value}" for key, value in ENVIRONMENT.items())


def _slurm(recipe: Recipe, place: Place) -> str:
    workers, cpus = recipe.processes, _cpus(recipe)
    gpus = f"#SBATCH --gpus-per-task={place.gpus}\n" if place.gpus else ""
    ray_gpus = f" --num-gpus={place.gpus}" if place.gpus else ""
    return f"""#!/bin/bash
#SBATCH --job-name={recipe.name}
#SBATCH --ntasks={workers}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
{gpus}#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# One Ray node a task. --signal gives the job two minutes to save; requeued, it goes on from its last checkpoint.
set -euo pipefail
umask 077
folder={place.storage}/slurm-$SLURM_JOB_ID
mkdir -p "$folder"
cat > "$folder/recipe.yaml" <<'RECIPE'
{recipe_there(recipe, place).rstrip()}
RECIPE
{_EXPORTS}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token"
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
address=$head:{GCS_PORT}
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \\
    ray start --head --block --port={GCS_PORT} --num-cpus={cpus}{ray_gpus} --dashboard-host=127.0.0.1 &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    sleep 20  # the head must listen before others ask for it
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" --overlap \\
        ray start --block --address="$address" --num-cpus={cpus}{ray_gpus} &
fi
sleep 20
# A signal ends the wait, not the job: it is passed on, and waited for. The steps above end with the allocation.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \\
    expertmesh train "$folder/recipe.yaml" --address "$address" &
job=$!
trap 'kill -TERM $job' TERM
wait $job || wait $job
"""


def _skypilot(recipe: Recipe, place: Place) -> str:
    cpus = _cpus(recipe)
    resources: dict[str, Any] = {"cpus": f"{cpus}+", "image_id": f"docker:{place.image}"}
    if place.gpus:
        resources["accelerators"] = f"H100:{place.gpus}"
    ray_gpus = f" --num-gpus={place.gpus}" if place.gpus else ""
    run = f"""set -euo pipefail
{_EXPORTS}
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.expertmesh-token"
printf %s "$EXPERTMESH_TOKEN" > "$RAY_AUTH_TOKEN_PATH"
head=$(echo "$SKYPILOT_NODE_IPS" | head -n1)
if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
    sleep 20  # the head must listen first
    exec ray start --block --address="$head:{GCS_PORT}" --num-cpus={cpus}{ray_gpus}
fi
cat > "$HOME/recipe.yaml" <<'RECIPE'
{recipe_there(recipe, place).rstrip()}
RECIPE
ray start --head --block --port={GCS_PORT} --num-cpus={cpus}{ray_gpus} --dashboard-host=127.0.0.1 &
sleep 40
expertmesh train "$HOME/recipe.yaml" --address "$head:{GCS_PORT}"
kill $!
"""
    task = {
        "name": _label(recipe.name),
        "num_nodes": recipe.processes,
        "resources": resources,
        "file_mounts": {place.storage: {"name": place.claim, "mode": "MOUNT"}},
        "secrets": {"EXPERTMESH_TOKEN": None},  # given with: sky launch --secret EXPERTMESH_TOKEN
        "run": _Literal(run),
    }
    return yaml.dump(task, Dumper=_Dumper, sort_keys=False, width=120)


class _Literal(str):
    """Text that YAML shows as it is, line by line."""


class _Dumper(yaml.SafeDumper):
    """With `_Literal`."""


_Dumper.add_representer(
    _Literal, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
)
