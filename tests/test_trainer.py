"""Training gives the same losses on any number of ranks, and a resumed run the same bits as one that never stopped."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from statistics import fmean

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import losses, prepare_tiny_data, tiny_model, tiny_training, train, write_random_checkpoint

from expertmesh.kernels.device import Device
from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.whereabouts import HERE, Place
from expertmesh.system.model.checkpoint import open_checkpoint, write_tensors
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.train import snapshot
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.dataset import TokenDataset
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.snapshot import checkpoints_of, last_whole
from expertmesh.system.train.trainer import NotFinite, Record, Trainer, Watch, learning_rate


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("tiny")
    prepare_tiny_data(run_dir)
    return run_dir / "data"


def new_run(data: Path, run_dir: Path) -> Path:
    shutil.copytree(data, run_dir / "data")
    return run_dir


def _experts_used(data: Path, folder: Path, taus: list[float]) -> list[float]:
    """FFN experts a token at the end of a short run with each tau, on one rank."""
    groups, used = build_groups(ParallelSizes()), []
    for tau in taus:
        model = tiny_model(moe={"tau": tau, "balance_loss_weight": 0.1})
        config = tiny_training(steps=40, learning_rate=3e-3, validate_every=40, checkpoint_every=40)
        records: list[Record] = []
        run_dir = new_run(data, folder / str(tau))
        Trainer(model, config, run_dir, groups, Device("cpu", "gloo"), {}, None).run(records.append)
        used.append(fmean([record["ffn_experts_per_token"] for record in records if record["kind"] == "step"][-10:]))
    return used


def test_lowering_tau_lowers_the_ffn_experts_of_a_token(data, tmp_path):
    """MoE++ (arXiv 2410.07348, table 3): tau buys speed with quality. Real runs, with a loss heavy enough to show."""
    (used,) = run_ranks(_experts_used, 1, data, tmp_path, [0.1, 0.25, 0.5, 0.75, 1.0])
    assert used == sorted(used) and used[-1] - used[0] > 0.3, used


# Float32 sums in another order: about 1e-7 a step, growing with the steps.
SAME_LOSS = 2e-6


@pytest.fixture(scope="module")
def single_rank_losses(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = new_run(data, tmp_path_factory.mktemp("single") / "run")
    (records,) = run_ranks(train, 1, run_dir, ParallelSizes(), tiny_model(), tiny_training())
    return losses(records)


@pytest.mark.parametrize("dp, ep", [(2, 1), (2, 2), (4, 2)], ids=["data parallel", "expert parallel", "both"])
def test_ranks_do_not_change_losses(data, tmp_path, single_rank_losses, dp, ep):
    run_dir = new_run(data, tmp_path / "run")
    ranks = run_ranks(train, dp, run_dir, ParallelSizes(dp=dp, ep=ep), tiny_model(), tiny_training())
    for records in ranks:
        assert losses(records) == pytest.approx(single_rank_losses, rel=SAME_LOSS)
    step = next(record for record in ranks[0] if record["kind"] == "step")
    assert (step["dispatch_bytes"] > 0) == (ep > 1)


@pytest.mark.parametrize(
    "stage, micro_batch_size", [(1, None), (2, 2), (3, 4)], ids=["ZeRO 1", "ZeRO 2, four micro-batches", "ZeRO 3, two"]
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(data, tmp_path, stage, micro_batch_size):
    sizes, config = ParallelSizes(dp=2, ep=2), tiny_training(zero_stage=stage, micro_batch_size=micro_batch_size)
    whole = run_ranks(train, 2, new_run(data, tmp_path / "whole"), sizes, tiny_model(), config)[0]
    halfway = checkpoints_of(tmp_path / "whole")[0]
    assert halfway.name == "step-000002"
    resumed_dir = new_run(data, tmp_path / "resumed")
    resumed = run_ranks(train, 2, resumed_dir, sizes, tiny_model(), config, halfway)[0]
    assert losses(resumed) == losses(whole)[2:]
    kinds = ("validation",)
    assert [r for r in resumed if r["kind"] in kinds] == [r for r in whole if r["kind"] in kinds][1:]


def test_resuming_on_fewer_ranks_goes_on_with_the_same_losses(data, tmp_path):
    config = tiny_training()
    whole = run_ranks(train, 2, new_run(data, tmp_path / "whole"), ParallelSizes(dp=2, ep=2), tiny_model(), config)[0]
    halfway = checkpoints_of(tmp_path / "whole")[0]
    resumed_dir = new_run(data, tmp_path / "resumed")
    (resumed,) = run_ranks(train, 1, resumed_dir, ParallelSizes(), tiny_model(), config, halfway)
    assert losses(resumed) == pytest.approx(losses(whole)[2:], rel=SAME_LOSS)


def test_a_run_that_begins_with_a_checkpoint(data, tmp_path):
    """Its weights, a fresh optimizer, steps counted from 1; each rank reads its own experts."""
    start = open_checkpoint(write_random_checkpoint(new_run(data, tmp_path / "start"), tiny_model()))
    model = Transformer(tiny_model())
    start.load(model)
    tokens_BS1 = TokenDataset(tmp_path / "start" / "data").batch(0, 8, 32, 0)
    with torch.inference_mode():
        expected = LanguageModelLoss(model, LocalDispatcher(), Groups())(tokens_BS1).cross_entropy.item()
    begun = []
    for ranks, sizes in ((1, ParallelSizes()), (2, ParallelSizes(dp=2, ep=2))):
        run_dir = new_run(data, tmp_path / f"{ranks}")
        begun.append(run_ranks(train, ranks, run_dir, sizes, tiny_model(), tiny_training(steps=2), None, start)[0])
    assert [record["step"] for record in begun[0] if record["kind"] == "step"] == [1, 2]
    assert losses(begun[0])[0] == pytest.approx(expected, rel=SAME_LOSS)
    assert losses(begun[1]) == pytest.approx(losses(begun[0]), rel=SAME_LOSS)


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two expert-parallel ranks."""
    run_dir = new_run(data, tmp_path_factory.mktemp("two") / "run")
    return losses(run_ranks(train, 2, run_dir, ParallelSizes(dp=2, ep=2), tiny_model(), tiny_training())[0])


class Poison(Watch):
    """Spoils the weights of one rank before a step, as a batch might, unless that batch is left out."""

    def __init__(self, rank: int, skip: frozenset[int]) -> None:
        self._armed = rank == 1 and 3 not in skip

    def before(self, step: int, model: torch.nn.Module) -> None:
        if step == 3 and self._armed:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.nan)


def _poisoned(run_dir: Path, resume_from: Path | None, skip: frozenset[int]) -> tuple[list[Record], int | None]:
    """A rank's records, and the step that was not finite."""
    groups = build_groups(ParallelSizes(dp=2, ep=2))
    model, records = tiny_model(), list[Record]()
    trainer = Trainer(
        *(model, tiny_training(), run_dir, groups, Device("cpu", "gloo"), {}, resume_from),
        skip=skip,
    )
    try:
        trainer.run(records.append, Poison(groups.rank, skip))
    except NotFinite as error:
        return records, error.step
    return records, None


def test_a_loss_that_is_not_finite_stops_all_ranks_and_its_batch_can_be_left_out(data, tmp_path, uninterrupted):
    run_dir = new_run(data, tmp_path / "run")
    for records, step in run_ranks(_poisoned, 2, run_dir, None, frozenset()):
        assert step == 3 and [record["step"] for record in records if record["kind"] == "step"] == [1, 2]
    (saved,) = (run_dir / "not-finite").iterdir()
    whole_BS1 = TokenDataset(run_dir / "data").batch(2, 8, 32, 0)
    assert torch.equal(load_file(saved)["tokens_BS1"], whole_BS1), "the batch of step 3, of all ranks"

    records, step = run_ranks(_poisoned, 2, run_dir, checkpoints_of(run_dir)[0], frozenset({3}))[0]
    assert step is None and len(losses(records)) == 2
    assert losses(records)[0] != uninterrupted[2], "the batch was not left out"
    assert losses(records)[0] == pytest.approx(uninterrupted[2], rel=0.05), "another batch was to take its place"


class LeaveAt(Watch):
    """One rank that wants to leave after its second step."""

    def __init__(self, rank: int) -> None:
        self._rank, self._steps = rank, 0

    def wants_to_leave(self) -> bool:
        self._steps += 1
        return self._rank == 1 and self._steps == 3


def _leaving(run_dir: Path, resume_from: Path | None) -> list[Record]:
    groups = build_groups(ParallelSizes(dp=2, ep=2))
    records: list[Record] = []
    trainer = Trainer(tiny_model(), tiny_training(), run_dir, groups, Device("cpu", "gloo"), {}, resume_from)
    trainer.run(records.append, LeaveAt(groups.rank) if resume_from is None else None)
    return records


def test_when_one_rank_wants_to_leave_all_save_and_the_rest_is_the_same_bit_for_bit(data, tmp_path, uninterrupted):
    """Step 3 is no step at which anything else is saved."""
    run_dir = new_run(data, tmp_path / "run")
    left = run_ranks(_leaving, 2, run_dir, None)
    assert [len(losses(records)) for records in left] == [3, 3]
    assert checkpoints_of(run_dir)[-1].name == "step-000003"
    rest = run_ranks(_leaving, 2, run_dir, checkpoints_of(run_dir)[-1])[0]
    assert losses(left[0]) + losses(rest) == uninterrupted


def _with_held_files(run_dir: Path, leave: bool) -> list[Record]:
    """Rank 1's files of step 2 appear when step 4 is made; or, where a rank leaves at step 3, a while after that."""
    groups, records, let_go = build_groups(ParallelSizes(dp=2, ep=2)), list[Record](), threading.Event()

    def write_when_let_go(tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert groups.rank == 0 or let_go.wait(30)
        write_tensors(tensors, path)

    def report(record: Record) -> None:
        records.append(record)
        if record["kind"] in ("step", "validation"):
            assert HERE.place == Place("sums of the step" if record["kind"] == "step" else "sums of a validation")
        if record["kind"] == "step" and record["step"] == (3 if leave else 4):
            assert checkpoints_of(run_dir) == []
            threading.Timer(0.2 if leave else 0, let_go.set).start()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "write_tensors", write_when_let_go)
        trainer = Trainer(tiny_model(), tiny_training(), run_dir, groups, Device("cpu", "gloo"), {}, None)
        update = trainer.zero._engine.step

        def updated() -> None:
            assert HERE.place == Place("gradients and weights", inside=True)
            update()

        patch.setattr(trainer.zero._engine, "step", updated)
        trainer.run(report, LeaveAt(groups.rank) if leave else None)
    return records


def test_steps_are_made_while_a_checkpoint_is_written_which_holds_what_it_held_without_them(data, tmp_path):
    held, plain = new_run(data, tmp_path / "held"), new_run(data, tmp_path / "plain")
    for records in run_ranks(_with_held_files, 2, held, False):
        saved = [record["step"] for record in records if record.get("what") == "saved"]
        assert saved == [2, 4] and len(losses(records)) == 4
    run_ranks(_leaving, 2, plain, None)
    files = sorted((plain / "checkpoints" / "step-000002").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert (held / file.relative_to(plain)).read_bytes() == file.read_bytes()


def test_all_is_on_the_disk_when_a_job_ends_with_a_checkpoint_in_flight(data, tmp_path):
    run_ranks(_with_held_files, 2, new_run(data, tmp_path / "run"), True)
    assert [folder.name for folder in checkpoints_of(tmp_path / "run")] == ["step-000002", "step-000003"]
    assert last_whole(tmp_path / "run") == (checkpoints_of(tmp_path / "run")[-1], {})


def _with_a_full_disk(run_dir: Path) -> str:
    """What each rank raises, where rank 1 cannot write."""
    groups = build_groups(ParallelSizes(dp=2, ep=2))

    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if groups.rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_tensors(tensors, path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as raised:
        patch.setattr(snapshot, "write_tensors", write)
        trainer = Trainer(tiny_model(), tiny_training(), run_dir, groups, Device("cpu", "gloo"), {}, None)
        trainer.run(lambda record: None)
    return f"{type(raised.value).__name__}: {raised.value}"


def test_one_rank_whose_disk_is_full_says_so_and_the_others_lose_a_peer(data, tmp_path):
    run_dir = new_run(data, tmp_path / "run")
    other, full = run_ranks(_with_a_full_disk, 2, run_dir)
    assert full.startswith("SaveFailed: step 2 could not be saved: ") and "No space left on device" in full
    assert not other.startswith("SaveFailed")
    assert checkpoints_of(run_dir) == []


def test_learning_rate_rises_to_its_peak_and_falls_to_its_minimum():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1e-3, min_learning_rate=1e-5)
    assert learning_rate(1, config) == pytest.approx(1e-4)
    assert learning_rate(10, config) == pytest.approx(1e-3)
    assert learning_rate(55, config) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(100, config) == pytest.approx(1e-5)
