"""The house holds: imports point left, every folder is in the package, nothing is found under a bare folder name."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["kernels", "parallel", "system", "launch"]  # each may import those before it
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported_modules(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules.append(node.module or "")
    return modules


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_left(path):
    own = LAYERS.index(path.relative_to(ROOT).parts[0])
    for module in imported_modules(path):
        assert module.split(".")[0] not in LAYERS, f"{module}: write expertmesh.{module}"
        if module.startswith("expertmesh."):
            layer = module.split(".")[1]
            assert LAYERS.index(layer) <= own, f"{layer} lies right of {LAYERS[own]}"


STANDS_ON: dict[str, set[str]] = {
    "model": set(),
    "train": {"model"},
    "serve": {"model"},
    "convert": {"model"},
    "inside": {"model"},
    "plan": {"model", "train"},
}


@pytest.mark.parametrize("package", STANDS_ON)
def test_parts_of_system_import_one_way(package):
    """All stand on model, and plan rehearses what train does; none of them knows another."""
    for path in (ROOT / "system" / package).glob("*.py"):
        for module in imported_modules(path):
            others = STANDS_ON.keys() - {package} - STANDS_ON[package]
            assert not any(module.startswith(f"expertmesh.system.{other}") for other in others), f"{path}: {module}"


def test_only_one_file_imports_ray():
    users = {path.name for path in SOURCES if any(m.split(".")[0] == "ray" for m in imported_modules(path))}
    assert users == {"ray_cluster.py"}


def test_every_folder_is_packaged_and_none_has_an_init():
    """A nested folder that is not listed is missing from the wheel without a word."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(("expertmesh", *path.parent.relative_to(ROOT).parts)) for path in SOURCES}
    assert folders == set(packages)
    assert not [path for path in SOURCES if path.name == "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_file_says_why_it_exists(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "no docstring at the top"


def test_links_for_type_checkers_lead_to_the_folders():
    for layer in LAYERS:
        assert (ROOT / ".types" / "expertmesh" / layer).resolve() == ROOT / layer
