"""Who multiplies float32: exact, the same in every process, and nothing of it left behind."""

from __future__ import annotations

import threading

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import float32_products as module
from expertmesh.kernels.float32_products import AS_TORCH_CHOOSES, ONEDNN, float32_products, is_exact, products_of


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def undecided():
    float32_products.cache_clear()
    yield
    float32_products.cache_clear()


def test_products_stay_float32():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(70, 300, generator=generator), torch.randn(300, 50, generator=generator)
    with float32_products():
        assert_close(left @ right, left.double() @ right.double())


def test_nothing_is_left_behind_and_no_lots_are_drawn(undecided):
    before, state = setting(), torch.get_rng_state()
    with float32_products():
        pass
    with pytest.raises(KeyError), ONEDNN:
        assert setting() == "bf16"
        raise KeyError
    assert setting() == before and torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == "highest", "torch refuses to say where both settings were mixed"


def test_the_last_of_several_threads_gives_the_permission_back():
    before, inside, leave = setting(), threading.Event(), threading.Event()

    def hold() -> None:
        with ONEDNN:
            inside.set()
            leave.wait(10)

    with ONEDNN:
        thread = threading.Thread(target=hold)
        thread.start()
        assert inside.wait(10)
    assert setting() == "bf16", "the other thread still multiplies"
    leave.set()
    thread.join()
    assert setting() == before


REASONS = [  # exact, refused, whether oneDNN is taken, why
    (True, False, True, "exact and not hopelessly slow"),
    (False, False, False, "a machine that rounds to bfloat16 inside"),
    (True, True, False, "hopelessly slow"),
]


@pytest.mark.parametrize(("exact", "refused", "taken", "why"), REASONS, ids=[row[-1] for row in REASONS])
def test_choice(exact, refused, taken, why, undecided, monkeypatch):
    monkeypatch.setattr(module, "is_exact", lambda library: exact)
    monkeypatch.setattr(module, "is_refused", lambda library: refused)
    assert (float32_products() is ONEDNN) == taken


def test_rounding_is_noticed(monkeypatch):
    """As on a machine with AMX, where the permission means bfloat16."""
    assert is_exact(AS_TORCH_CHOOSES)
    exact = torch.mm
    monkeypatch.setattr(torch, "mm", lambda left, right: exact(left.bfloat16(), right.bfloat16()).float())
    assert not is_exact(AS_TORCH_CHOOSES)


def test_a_torch_without_the_setting_is_left_alone(undecided, monkeypatch):
    def missing(library: object) -> bool:
        raise AttributeError("fp32_precision")

    monkeypatch.setattr(module, "is_exact", missing)
    assert float32_products() is AS_TORCH_CHOOSES


def test_only_float32_asks():
    assert products_of(torch.bfloat16) is AS_TORCH_CHOOSES and products_of(torch.float64) is AS_TORCH_CHOOSES
    assert products_of(torch.float32) is float32_products()
