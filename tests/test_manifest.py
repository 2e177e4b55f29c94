"""Manifests: each part that a scheduler needs is where it looks for it, and the recipe inside is the recipe."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from commands import TINY_RECIPE

from expertmesh.launch.manifest import ENVIRONMENT, Place, manifest
from expertmesh.launch.recipe import Recipe, load_recipe
from expertmesh.launch.recovery import FaultConfig

PLACE = Place(image="registry/expertmesh:1", storage="/mnt/shared", claim="shared", gpus=1, attention=2, ffn=3)
SCHEMA = yaml.safe_load(Path(__file__).with_name("kuberay_rayjob.yaml").read_text())


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    monkeypatch.chdir(tmp_path)
    return load_recipe("tiny.yaml", ["name=Tiny_one", "cluster.cpus_per_worker=4"])


def kubernetes(recipe: Recipe, target: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(manifest(recipe, target, PLACE))}


@pytest.mark.parametrize("target", ["kuberay", "kuberay-service"])
def test_a_ray_job_on_kubernetes(recipe, target):
    found = kubernetes(recipe, target)
    job = found["RayJob"]
    jsonschema.validate(job, SCHEMA)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"] == {"num-cpus": "0"}, "no worker is placed beside the head"
    for group in groups:
        assert group["labels"] == {"pool": group["groupName"]}
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    for template in (head["template"], *(group["template"] for group in groups)):
        (container,) = template["spec"]["containers"]
        assert {item["name"]: item["value"] for item in container["env"]} == ENVIRONMENT
        mounted, volumes = (
            {v["name"] for v in template["spec"]["volumes"]},
            {v["name"] for v in container["volumeMounts"]},
        )
        assert mounted == volumes
        maps = [v["configMap"]["name"] for v in template["spec"]["volumes"] if "configMap" in v]
        assert maps == [found["ConfigMap"]["metadata"]["name"]]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    for document in found.values():
        assert document["metadata"]["name"].startswith("tiny-one"), "names of Kubernetes are lower case, without _"


@pytest.mark.parametrize("name", ["x" * 70, "7b_run", "A.b-", "0"])
def test_names_are_such_as_kubernetes_takes(recipe, name):
    for target in ("kuberay", "kuberay-service"):
        jsonschema.validate(kubernetes(recipe.model_copy(update={"name": name}), target)["RayJob"], SCHEMA)


def test_a_training_job(recipe):
    found = kubernetes(recipe, "kuberay")
    (group,) = found["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert (group["groupName"], group["replicas"]) == ("trainer", 2)
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "1"}
    assert found["RayJob"]["spec"]["shutdownAfterJobFinishes"] is True
    assert found["RayJob"]["spec"]["entrypoint"].startswith("expertmesh train /etc/expertmesh/recipe.yaml")


@pytest.mark.parametrize(
    "target, told", [("kuberay", "replicas: 3"), ("slurm", "--ntasks=3"), ("skypilot", "num_nodes: 3")]
)
def test_there_is_room_for_spares(recipe, target, told):
    spared = recipe.model_copy(update={"fault": FaultConfig(spares=1)})
    assert told in manifest(spared, target, PLACE)


def test_a_service(recipe):
    found = kubernetes(recipe, "kuberay-service")
    spec = found["RayJob"]["spec"]
    sizes = {group["groupName"]: group["replicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert sizes == {"attention": 2, "ffn": 3}
    assert "expertmesh serve /mnt/shared/runs/Tiny_one --attention 2 --ffn 3" in spec["entrypoint"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]
    door = found["Service"]["spec"]
    assert door["selector"].items() <= head["metadata"]["labels"].items(), "the Service finds the door"
    ports = [port["containerPort"] for port in head["spec"]["containers"][0]["ports"]]
    assert [port["targetPort"] for port in door["ports"]] == ports


def embedded(script: str) -> str:
    return script.split("<<'RECIPE'\n")[1].split("\nRECIPE\n")[0]


def test_slurm(recipe, tmp_path):
    script = manifest(recipe, "slurm", PLACE)
    head = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for option in ("--ntasks=2", "--cpus-per-task=4", "--gpus-per-task=1", "--signal=B:TERM@120", "--requeue"):
        assert f"#SBATCH {option}" in head
    assert script.startswith("#!/bin/bash\n#SBATCH"), "Slurm reads options up to the first command"
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_skypilot(recipe):
    task = yaml.safe_load(manifest(recipe, "skypilot", PLACE))
    assert (
        task["num_nodes"] == 2 and task["resources"]["cpus"] == "4+" and task["resources"]["accelerators"] == "H100:1"
    )
    assert "/mnt/shared" in task["file_mounts"] and "EXPERTMESH_TOKEN" in task["secrets"]
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True).stderr == ""


TEXTS = {
    "kuberay": lambda text: next(yaml.safe_load_all(text))["data"]["recipe.yaml"],
    "kuberay-service": lambda text: next(yaml.safe_load_all(text))["data"]["recipe.yaml"],
    "slurm": embedded,
    "skypilot": lambda text: embedded(yaml.safe_load(text)["run"]),
}


@pytest.mark.parametrize("target", TEXTS)
def test_the_recipe_inside_says_the_same(recipe, target, tmp_path):
    text = manifest(recipe, target, PLACE)
    (tmp_path / "there.yaml").write_text(TEXTS[target](text))
    there = load_recipe("there.yaml", [])
    assert there.settings() == recipe.settings() and there.parallel == recipe.parallel and there.fault == recipe.fault
    assert there.run_dir == "/mnt/shared/runs/Tiny_one" and there.cluster.address == "auto"


@pytest.mark.parametrize("target", TEXTS)
def test_safe_on_shared_hosts(recipe, target):
    text = manifest(recipe, target, PLACE)
    assert "ray stop" not in text, "it ends every Ray of a host"
    assert "token" in text and all(key in text for key in ENVIRONMENT)


def test_a_target_that_is_not_known(recipe):
    with pytest.raises(ValueError, match="--for swarm: supported: kuberay, kuberay-service, slurm, skypilot"):
        manifest(recipe, "swarm", PLACE)
