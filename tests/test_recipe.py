"""A recipe is right as a whole or refused with one line that says what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertmesh.launch.recipe import SHIPPED, Recipe, load_recipe, serve_settings

WRONG = [
    ("a misspelt key", ["train.step=5"], "unknown key train.step; did you mean steps?"),
    (
        "a misspelt key further down",
        ["model.moe.ffn_expert=4"],
        "unknown key model.moe.ffn_expert; did you mean ffn_experts",
    ),
    ("an unknown section", ["banana.x=1"], "unknown key banana; known keys: name, about, run_dir, start_from"),
    ("experts that ep does not divide", ["model.moe.ffn_experts=7"], "model.moe.ffn_experts=7: parallel.ep=2 does not"),
    (
        "a pyramid of which ep divides nothing",
        ["parallel.dp=4", "parallel.ep=4", "model.moe.ffn_experts=[2,6,2,6]", "model.moe.gating_residual=false"],
        "model.moe.ffn_experts=[2, 6, 2, 6]: parallel.ep=4 does not divide any of them; "
        "take a multiple of 4 experts, or ep one of [1, 2]",
    ),
    ("nowhere to move", ["parallel.ep=1", "train.rebalance_every=5"], "train.rebalance_every=5: with parallel.ep=1"),
    (
        "copies of experts that are everywhere",
        ["parallel.ep=1", "train.expert_copies=1"],
        "train.expert_copies=1: with parallel.ep=1 every rank has all experts already",
    ),
    (
        "copies of experts that are shards",
        ["train.zero_stage=3", "train.expert_copies=2"],
        "train.expert_copies=2: with train.zero_stage=3 there are no copies yet; take zero_stage of 0, 1 or 2",
    ),
    ("ep that does not divide dp", ["parallel.ep=3"], "ep=3 does not divide dp=2; with dp=2, ep may be one of [1, 2]"),
    ("a batch that dp does not divide", ["train.batch_size=7"], "train.batch_size=7: parallel.dp=2 does not divide it"),
    ("a sequence beyond the context", ["train.sequence_length=9999"], "longer than model.context_length=256"),
    (
        "nodes of no cluster",
        ["cluster.launcher=processes", "cluster.address=auto"],
        "cluster: address=auto: launcher=processes has none; leave it out, or launcher",
    ),
    (
        "a drill that nobody survives",
        ["cluster.launcher=environment", "chaos.kill=trainer:1@step=5"],
        "chaos.kill=trainer:1@step=5: cluster.launcher=environment starts no worker, and none anew; leave it out, or",
    ),
    ("a word for a number", ["train.steps=many"], "train.steps=many: Input should be a valid integer"),
    ("a number out of range", ["train.steps=0"], "train.steps=0: Input should be greater than or equal to 1"),
    ("kv heads that do not divide", ["model.attention.kv_heads=3"], "kv_heads=3 does not divide heads=4"),
    ("more choices than experts", ["model.moe.top_k=13"], "top_k=13 is more than all 12 experts"),
    ("a section made a value", ["train=5"], "train=5"),
    ("a value used as a section", ["name.x=5"], "name is a value, not a section"),
    ("no equals sign", ["train.steps"], "an override reads section.key=value"),
    ("a name that is a path", ["name=../x"], "name=../x"),
    ("an unknown gate mode", ["model.moe.gate_mode=soft"], "model.moe.gate_mode=soft: Input should be 'paper'"),
    (
        "a model beside a checkpoint",
        ["start_from=x", "model.layers=2"],
        "quickstart: start_from=x: leave out model, it comes with that checkpoint",
    ),
    (
        "more stages than layers",
        ["parallel.pp=4", "parallel.interleave=2", "train.batch_size=8", "train.micro_batch_size=2"],
        "model.layers=4 are fewer than parallel.pp=4 x interleave=2 = 8; each needs one or more",
    ),
    ("runs without a pipeline", ["parallel.interleave=2"], "parallel: interleave=2 needs a pipeline: take pp of 2 or"),
    (
        "micro-batches that go in no groups",
        ["parallel.pp=2", "parallel.interleave=2"],
        "parallel.interleave=2: micro-batches go in groups of parallel.pp=2, and train.batch_size=16 has 1 of ",
    ),
    (
        "layers of several stages that are one",
        ["parallel.pp=2", "model.share_layers=true", "model.moe.gating_residual=false"],
        "model.share_layers=true: shared layers have no stages; take parallel.pp=1, not 2",
    ),
    (
        "micro-batches that do not make up the batch",
        ["train.micro_batch_size=5"],
        "train: micro_batch_size=5 does not divide batch_size=16",
    ),
    (
        "micro-batches that dp does not divide",
        ["train.batch_size=4", "train.micro_batch_size=1"],
        "train.micro_batch_size=1: parallel.dp=2 does not divide it; take a multiple of 2",
    ),
    (
        "experts that would move between stages",
        ["parallel.pp=2", "train.rebalance_every=5"],
        "train.rebalance_every=5: with parallel.pp=2 experts cannot move yet; take pp=1",
    ),
    (
        "bfloat16 without float32 masters",
        ["train.dtype=bfloat16"],
        "train.dtype=bfloat16: with train.zero_stage=1 there are no float32 masters yet; "
        "take zero_stage=3, or dtype=float32",
    ),
    (
        "sequences that cp does not divide",
        ["parallel.cp=3", "parallel.ep=1"],
        "train.sequence_length=128 is not cut evenly by 2 runs on each of parallel.cp=3 ranks; take a multiple of 6",
    ),
    (
        "heads that tp does not divide",
        ["parallel.tp=3"],
        "model.attention.heads=4: parallel.tp=3 does not divide it; take a multiple of 3, or tp one of [1, 2, 4]",
    ),
    (
        "key-value heads fewer than tp",
        ["parallel.tp=4"],
        "model.attention.kv_heads=2: parallel.tp=4 does not divide it",
    ),
    (
        "hidden units that etp does not divide",
        ["parallel.dp=3", "parallel.ep=1", "parallel.etp=3", "train.batch_size=15"],
        "model.moe.expert.hidden_size=256: parallel.etp=3 does not divide it",
    ),
    (
        "tokens that tp does not divide",
        ["parallel.tp=2", "train.sequence_length=127"],
        "train.sequence_length=127 is not cut evenly by parallel.tp=2; take a multiple of 2",
    ),
    ("an unknown strategy", ["cluster.strategy=LOOSE"], "cluster.strategy=LOOSE: Input should be 'PACK', 'SPREAD'"),
    ("labels without keys", ["cluster.where=trainer"], "cluster.where=trainer: Input should be a valid dictionary"),
    ("a head that Ray waits for less long for", ["cluster.head_s=61"], "cluster.head_s=61: Input should be less than"),
    ("a minimum above the peak", ["train.min_learning_rate=1"], "min_learning_rate=1.0 is above learning_rate"),
]


@pytest.mark.parametrize("overrides, line", [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_input_is_one_line_that_names_the_key(overrides, line):
    with pytest.raises(ValueError) as error:
        load_recipe("quickstart", overrides)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_labels_of_nodes_are_words():
    where = ["cluster.where.pool=trainer", "cluster.where.node=1"]
    assert load_recipe("quickstart", where).cluster.where == {"pool": "trainer", "node": "1"}


@pytest.mark.parametrize(
    "content, line",
    [("model: [", "not valid YAML"), ("- a\n", "a recipe is a mapping"), ("train: {steps: 1, steps2: 1}", "steps2")],
)
def test_wrong_files(tmp_path: Path, content, line):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=line):
        load_recipe(str(path), [])


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ValueError, match="no recipe 'quickstrt': give a YAML file, or one of .*quickstart"):
        load_recipe("quickstrt", [])


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED.glob("*.yaml")])
def test_shipped_recipes_are_valid(name):
    assert load_recipe(name, []).name == name


def test_overrides_reach_their_key_and_numbers_may_be_written_with_an_exponent(tmp_path):
    recipe = load_recipe("quickstart", ["train.learning_rate=3e-4", f"run_dir={tmp_path}/{{name}}", "name=other"])
    assert recipe.train.learning_rate == 3e-4
    assert recipe.run_folder == tmp_path / "other"


def test_a_file_may_leave_out_all_but_what_it_changes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 3}\n")
    recipe = load_recipe(str(path), [])
    assert (recipe.name, recipe.train.steps, recipe.model) == ("mine", 3, Recipe(name="x").model)


def test_settings_that_decide_the_losses_are_compared_on_resume_and_others_are_not():
    base = load_recipe("quickstart", []).settings()
    assert load_recipe("quickstart", ["train.checkpoint_every=7", "parallel.ep=1"]).settings() == base
    for change in ("train.seed=1", "model.layers=5", "data.max_bytes=5", "train.batch_size=4"):
        assert load_recipe("quickstart", [change]).settings() != base


def test_a_checkpoint_takes_the_place_of_the_recipes_model():
    recipe = load_recipe("quickstart", ["start_from=x"])
    assert recipe.start_from == "x" and "model" not in recipe.model_fields_set
    assert recipe.train == load_recipe("quickstart", []).train


def test_what_an_earlier_version_did_not_know_has_the_value_that_nobody_set():
    now = load_recipe("quickstart", []).settings()
    saved = json.loads(json.dumps(now)) | {"tokens": "digest"}
    del saved["model"]["moe"]["balance_over"], saved["model"]["attention"]["sliding_window"], saved["train"]["seed"]
    assert Recipe.settings_of(saved) == now | {"tokens": "digest"}
    other = load_recipe("quickstart", ["train.seed=3"]).settings()
    assert Recipe.settings_of(saved)["train"] != other["train"]
    strange = saved | {"train": {"steps_of_old": 1}}
    assert Recipe.settings_of(strange) == strange
    from_checkpoint = {key: now[key] for key in ("data", "train")} | {"start_from": "/a"}
    assert Recipe.settings_of(from_checkpoint) == from_checkpoint


def test_settings_of_serving():
    settings = serve_settings(["serve.micro_batches=2", "serve.wire=broadcast", "serve.wire_format=fp8"])
    assert (settings.micro_batches, settings.wire, settings.wire_format) == (2, "broadcast", "fp8")
    assert settings.page_size == 16 and serve_settings([]).micro_batches == 3
    assert serve_settings(["serve.micro_batches=2", "serve.micro_batches=1"]).micro_batches == 1, "the last one counts"


WRONG_SETTINGS = [
    (["serve.wires=routed"], "unknown key serve.wires; did you mean wire?"),
    (["micro_batches=2"], "unknown key micro_batches; known keys: serve"),
    (["serve.micro_batches=5"], "serve.micro_batches=5: Input should be less than or equal to 4"),
    (["serve.wire=sent"], "serve.wire=sent: Input should be 'routed' or 'broadcast'"),
    (["serve"], "an override reads section.key=value"),
]


@pytest.mark.parametrize("changes, line", WRONG_SETTINGS, ids=[line for _, line in WRONG_SETTINGS])
def test_wrong_settings_of_serving(changes, line):
    with pytest.raises(ValueError) as error:
        serve_settings(changes)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_the_longest_request():
    """A page counts whole; a cache that is larger than a context makes no context longer."""
    rooms = [serve_settings([f"serve.cache_tokens={n}", "serve.page_size=8"]).room(96) for n in (17, 24, 95, 500)]
    assert rooms == [24, 24, 96, 96] and serve_settings([]).room(96) == 96
