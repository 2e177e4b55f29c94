"""A recipe: one YAML file that says everything about a job, checked as a whole before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from expertmesh.launch.chaos import ChaosConfig
from expertmesh.launch.recovery import FaultConfig
from expertmesh.parallel.recipe_section import RecipeSection
from expertmesh.parallel.sizes import ParallelSizes, divisors
from expertmesh.system.model.check_split import check_split
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.train.config import DataConfig, TrainConfig

Label = Annotated[str, Field(coerce_numbers_to_str=True)]  # node=1
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
SHIPPED = Path(__file__).parent / "recipes"


class ClusterConfig(RecipeSection):
    """Where workers run. An own Ray is one node without labels: `where` and `strategy` say nothing there."""

    launcher: Literal["ray", "processes", "environment"] = Field(
        "ray",
        description="who starts the workers: ray; nobody else, as processes of this host; torchrun or Slurm's srun, "
        "which start this command once a rank",
    )
    address: str | None = Field(None, description="null: an own Ray here; 'auto' or host:port: a running one")
    cpus_per_worker: int | None = Field(None, ge=1, description="null: all cores here, shared evenly; elsewhere 1")
    where: dict[str, Label] = Field(
        {}, description="Ray labels that a worker's node must have, such as {pool: trainer}"
    )
    strategy: Strategy = Field("PACK", description="how workers share nodes, in the words of Ray's placement groups")
    head_s: float = Field(
        45.0, gt=0, le=55, description="seconds without an answer of the cluster's head after which a job gives up"
    )

    @model_validator(mode="after")
    def _only_ray_has_nodes(self) -> ClusterConfig:
        if self.launcher != "ray":
            for key in ("address", "where", "strategy"):
                if (value := getattr(self, key)) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}={value}: launcher={self.launcher} has none; leave it out, or launcher")
        return self


class Recipe(RecipeSection):
    """A training job. The same recipe runs anywhere; only `cluster` says where."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = Field("", description="what it is, in a line")
    run_dir: str = "runs/{name}"
    start_from: str | None = Field(
        None, description="a checkpoint, ours or Hugging Face's, whose architecture, weights and tokenizer are taken"
    )
    model: ModelConfig = ModelConfig()
    parallel: ParallelSizes = ParallelSizes()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    fault: FaultConfig = FaultConfig()
    chaos: ChaosConfig = ChaosConfig()

    @property
    def run_folder(self) -> Path:
        return Path(self.run_dir.replace("{name}", self.name)).absolute()

    @property
    def processes(self) -> int:
        """Workers, and spares for them: what a cluster must have room for."""
        return self.parallel.world_size + self.fault.spares

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run it goes on from, as JSON has it."""
        train = self.train.model_dump(mode="json")
        for free in (
            "steps",
            "validate_every",
            "validation_batches",
            "checkpoint_every",
            "keep_checkpoints",
            "rebalance_every",
            "expert_copies",
            "recompute",
            "zero_stage",
            "dtype",
        ):
            train.pop(free)
        data = self.data.model_dump(mode="json")
        origin: dict[str, Any] = {"model": self.model.model_dump(mode="json", exclude={"vocab_size"})}
        if self.start_from is not None:
            origin = {"start_from": str(Path(self.start_from).absolute())}
        return {**origin, "data": data, "train": train}

    @classmethod
    def settings_of(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """`settings` as a run saved them; what its version did not know has the value that nobody set."""
        sections = {key: value for key, value in saved.items() if key in cls.model_fields}
        try:
            return saved | cls.model_validate({"name": "saved", **sections}).settings()
        except ValidationError:  # it had settings that there are no more
            return saved

    @model_validator(mode="after")
    def _somebody_replaces_workers(self) -> Recipe:
        if self.cluster.launcher == "environment":
            asked = {"fault.spares": self.fault.spares, "chaos.kill": self.chaos.kill, "chaos.stop": self.chaos.stop}
            if self.fault.not_finite == "skip":
                asked["fault.not_finite"] = "skip"
            for key, value in asked.items():
                if value:
                    told = "cluster.launcher=environment starts no worker, and none anew"
                    raise ValueError(f"{key}={value}: {told}; leave it out, or take launcher=processes")
        return self

    @model_validator(mode="after")
    def _checkpoint_says_what_it_is(self) -> Recipe:
        if self.start_from is None:
            return self
        for key, given in (("model", "model" in self.model_fields_set), ("data.tokenizer", self.data.tokenizer)):
            if given:
                raise ValueError(f"start_from={self.start_from}: leave out {key}, it comes with that checkpoint")
        return self


def load_recipe(name_or_path: str, overrides: list[str]) -> Recipe:
    """Read a shipped recipe by name, or a file, apply `section.key=value` overrides, and check it all.

    Raises ValueError with one line that says which key is wrong, what it holds, and what would be right.
    """
    path = _find(name_or_path)
    content = _read(path)
    content.setdefault("name", path.stem)
    if any(override.startswith("start_from=") for override in overrides):  # it takes the place of the recipe's model
        content.pop("model", None)
    for override in overrides:
        _apply(content, override)
    try:
        recipe = Recipe(**content)
    except ValidationError as error:
        raise ValueError(f"{name_or_path}: {_first_problem(error)}") from None
    if recipe.start_from is None:  # else it is checked when the checkpoint is looked at
        check_together(recipe, recipe.model)
    return recipe


class _Served(RecipeSection):
    """What a checkpoint is served with."""

    serve: ServeConfig = ServeConfig()


def serve_settings(changes: list[str]) -> ServeConfig:
    """The settings of serving with `serve.key=value` changes. Raises ValueError as `load_recipe` does."""
    content: dict[str, Any] = {}
    for change in changes:
        _apply(content, change)
    try:
        return _Served(**content).serve
    except ValidationError as error:
        raise ValueError(_first_problem(error, _Served)) from None


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _read(path: Path) -> dict[str, Any]:
    """The content of a recipe file. What it `extends`, a shipped recipe or a file, gives the sections it leaves out."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections, such as model, parallel, data, train")
    base = content.pop("extends", None)
    if base is None:
        return content
    inherited = _read(_find(str(base)))
    return {key: value for key, value in inherited.items() if key not in ("name", "about")} | content


def _find(name_or_path: str) -> Path:
    shipped = SHIPPED / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise ValueError(f"no recipe {name_or_path!r}: give a YAML file, or one of {', '.join(shipped_recipes())}")


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: an override reads section.key=value, such as train.steps=100")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ValueError(f"{override!r}: {section} is a value, not a section")
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{override!r}: {text!r} is not a YAML value") from None


def _first_problem(error: ValidationError, root: type[BaseModel] | None = None) -> str:
    """One line for the first thing that is wrong in a recipe, or in another `root`."""
    problem = error.errors()[0]
    path, section = _in_recipe([str(part) for part in problem["loc"]], root or Recipe)
    place = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = list(section.model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {place}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict | BaseModel) or problem["type"] == "missing":
        return f"{place}: {message}" if place else message
    return f"{place}={problem['input']}: {message}"


def _in_recipe(path: list[str], root: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The path as the recipe has it, and the section that holds its last key.

    Of a section that has several kinds, pydantic puts the kind's name into the path; a recipe has it in a key.
    """
    section = root
    kinds: dict[str, type[BaseModel]] = {}
    keys = []
    for name in path:
        if name in kinds:
            section, kinds = kinds[name], {}
            continue
        keys.append(name)
        field = section.model_fields.get(name)
        sections = list(_sections_in(field.annotation)) if field else []
        kinds = {kind: each for each in sections for kind in _kind_names(each)}
        if sections and name != path[-1]:
            section = sections[0]
    return keys, section


def _kind_names(section: type[BaseModel]) -> tuple[str, ...]:
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section itself, or those of an optional section or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)


def check_together(recipe: Recipe, model: ModelConfig) -> None:
    """Rules between the sections and the model. Raises ValueError."""
    sizes, moe = recipe.parallel, model.moe
    for key, place in recipe.chaos.places().items():
        if place.rank >= sizes.world_size:
            raise ValueError(f"chaos.{key}: there is no trainer {place.rank}; the job has {sizes.world_size} workers")
    if moe.quantization:
        told = f"start_from={recipe.start_from}" if recipe.start_from else "model.moe.quantization"
        raise ValueError(f"{told}: quantised experts are not trained; train the model before `convert quantize`")
    tp, ep, dp = sizes.tp, sizes.ep, sizes.dp
    check_split(model, sizes)
    counts = moe.experts_of_layers
    if all(experts % ep for experts in counts):
        fits = [size for size in divisors(sizes.stage_size // sizes.etp) if any(each % size == 0 for each in counts)]
        experts, them = (list(moe.pyramid), "any of them") if moe.pyramid else (moe.ffn_experts, "it")
        raise ValueError(
            f"model.moe.ffn_experts={experts}: parallel.ep={ep} does not divide {them}; "
            f"take a multiple of {ep} experts, or ep one of {fits}"
        )
    train = recipe.train
    key = "micro_batch_size" if train.micro_batch_size else "batch_size"
    at_once = train.micro_batch_size or train.batch_size
    if at_once % dp:
        raise ValueError(f"train.{key}={at_once}: parallel.dp={dp} does not divide it; take a multiple of {dp}")
    if sizes.interleave > 1 and train.micro_batches % sizes.pp:
        raise ValueError(
            f"parallel.interleave={sizes.interleave}: micro-batches go in groups of parallel.pp={sizes.pp}, and "
            f"train.batch_size={train.batch_size} has {train.micro_batches} of train.micro_batch_size={at_once}"
        )
    if train.dtype != "float32" and train.zero_stage != 3:
        raise ValueError(
            f"train.dtype={train.dtype}: with train.zero_stage={train.zero_stage} there are no float32 masters yet; "
            "take zero_stage=3, or dtype=float32"
        )
    length, runs = recipe.train.sequence_length, 2 * sizes.cp if sizes.cp > 1 else 1
    if length % (runs * tp):
        what = f"2 runs on each of parallel.cp={sizes.cp} ranks" if runs > 1 else f"parallel.tp={tp}"
        raise ValueError(f"train.sequence_length={length} is not cut evenly by {what}; take a multiple of {runs * tp}")
    if recipe.train.rebalance_every is not None:
        what = f"train.rebalance_every={recipe.train.rebalance_every}"
        if ep == 1:
            raise ValueError(f"{what}: with parallel.ep=1 experts have nowhere to move")
        for key in ("tp", "pp", "cp", "etp"):
            if (degree := getattr(sizes, key)) > 1:
                raise ValueError(f"{what}: with parallel.{key}={degree} experts cannot move yet; take {key}=1")
    if train.expert_copies:
        what = f"train.expert_copies={train.expert_copies}"
        if ep == 1:
            raise ValueError(f"{what}: with parallel.ep=1 every rank has all experts already")
        if train.zero_stage == 3:
            raise ValueError(f"{what}: with train.zero_stage=3 there are no copies yet; take zero_stage of 0, 1 or 2")
    if recipe.train.sequence_length > model.context_length:
        raise ValueError(
            f"train.sequence_length={recipe.train.sequence_length} is longer than "
            f"model.context_length={model.context_length}"
        )
