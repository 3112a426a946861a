"""Updates that are not plain factors: LoHa, LoKr and whole ones, against PEFT's own and plain float64 maths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr
from lorakit.errors import AdapterError


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loha(**changes) -> Loha:
    return replace(Loha(randn(6, 2), randn(2, 4, seed=1), randn(6, 2, seed=2), randn(2, 4, seed=3), 3.0), **changes)


def test_a_loha_is_the_product_number_by_number():
    h = loha()
    expected = 1.5 * (h.w1a @ h.w1b) * (h.w2a @ h.w2b)
    torch.testing.assert_close(h.delta(), expected)
    assert torch.linalg.matrix_rank(h.delta()) == 4  # r²


def test_a_loha_in_tucker_form_is_pefts():
    from peft.tuners.loha.layer import HadaWeightCP

    parts = {
        "t1": randn(2, 2, 3, 3, seed=4),
        "w1a": randn(2, 6, seed=5),
        "w1b": randn(2, 4, seed=6),
        "t2": randn(2, 2, 3, 3, seed=7),
        "w2a": randn(2, 6, seed=8),
        "w2b": randn(2, 4, seed=9),
    }
    order = ("t1", "w1a", "w1b", "t2", "w2a", "w2b")
    expected = HadaWeightCP.apply(*(parts[n] for n in order), torch.tensor(1.5, dtype=torch.float64))
    h = Loha(alpha=3.0, **parts)
    h.check("m")
    torch.testing.assert_close(h.delta(), expected)
    assert h.delta().shape == (6, 4, 3, 3)


def test_a_loha_of_a_convolution_takes_the_weights_shape():
    h = loha(w1b=randn(2, 36), w2b=randn(2, 36, seed=1), shape=(6, 4, 3, 3))
    assert h.delta().shape == (6, 4, 3, 3)
    torch.testing.assert_close(h.delta().flatten(1), h.delta((6, 36)))


WHOLE = {"w1": randn(2, 3), "w2": randn(4, 5, seed=1)}
KRONECKERS = {
    "whole": WHOLE,
    "second a product": {"w1": WHOLE["w1"], "w2a": randn(4, 2, seed=2), "w2b": randn(2, 5, seed=3)},
    "both products": {
        "w1a": randn(2, 2, seed=4),
        "w1b": randn(2, 3, seed=5),
        "w2a": randn(4, 2, seed=2),
        "w2b": randn(2, 5, seed=3),
    },
    "convolution": {"w1": WHOLE["w1"], "w2": randn(4, 5, 3, 3, seed=6)},
    "convolution, flat product": {
        "w1": WHOLE["w1"],
        "w2a": randn(4, 2, seed=7),
        "w2b": randn(2, 45, seed=8),
        "shape": (8, 15, 3, 3),
    },
    "convolution, Tucker": {
        "w1": WHOLE["w1"],
        "t2": randn(2, 2, 3, 3, seed=9),
        "w2a": randn(2, 4, seed=7),
        "w2b": randn(2, 5, seed=8),
    },
}


@pytest.mark.parametrize("kind", KRONECKERS)
def test_a_lokr_is_pefts(kind):
    from peft.tuners.lokr.layer import make_kron, make_weight_cp

    parts = KRONECKERS[kind]
    first = parts["w1"] if "w1" in parts else parts["w1a"] @ parts["w1b"]
    if "w2" in parts:
        second = parts["w2"]
    elif "t2" in parts:
        second = make_weight_cp(parts["t2"], parts["w2a"], parts["w2b"])
    else:
        second = parts["w2a"] @ parts["w2b"]
    scale = 1.0 if "w1b" not in parts and "w2b" not in parts else 3.0 / 2
    expected = make_kron(first, second, scale)
    k = Lokr(3.0, **parts)
    k.check("m")
    torch.testing.assert_close(k.delta(), expected.reshape(parts.get("shape", expected.shape)))


def test_a_whole_update_is_itself_and_a_copy():
    d = Dense(randn(3, 4).half())
    d.delta().zero_()
    assert d.weight.any()
    assert d.delta().dtype == torch.float32
    with pytest.raises(AdapterError, match="bias only"):
        Dense(None, randn(3)).delta()


@pytest.mark.parametrize(
    "update, said",
    [
        (loha(alpha=0.0), "alpha is 0"),
        (loha(w1b=randn(3, 4)), "w1_a .* do not fit"),
        (loha(t1=randn(2, 2, 3)), "do not fit"),
        (loha(w2a=randn(6, 2) * float("nan")), "w2a holds 12 values that are not finite"),
        (Lokr(1.0, w1=WHOLE["w1"]), "expected lokr_w2"),
        (Lokr(1.0, **WHOLE, w2a=randn(4, 2), w2b=randn(2, 5)), "expected lokr_w2"),
        (Lokr(1.0, w1=WHOLE["w1"], w2a=randn(4, 2), w2b=randn(3, 5)), "do not fit"),
        (Lokr(1.0, w1=WHOLE["w1"], w2=torch.ones(2, 2, dtype=torch.int8)), "dtype torch.int8"),
        (Dense(torch.full((2, 2), float("inf"))), "not finite"),
        (Dense(None), "without a tensor"),
    ],
)
def test_what_cannot_be_an_update_is_refused_with_its_module(update, said):
    with pytest.raises(AdapterError, match=said) as error:
        lk.Adapter(lk.LoraConfig(), {"the.module": update}).check()
    assert "the.module" in str(error.value)


def test_the_adapter_counts_moves_and_names_them_all():
    adapter = lk.Adapter(
        lk.LoraConfig(),
        {"a": lk.Factors(randn(2, 4), randn(3, 2), 2.0), "b": loha(), "c": Lokr(1.0, **WHOLE), "d": Dense(randn(2, 2))},
        embeddings={"<s1>": randn(8)},
    )
    assert list(adapter.updates) == ["a", "b", "c", "d"]
    assert adapter.parameters == 14 + 40 + 26 + 4 + 8
    half = adapter.to(torch.float16)
    assert {t.dtype for u in half.updates.values() for t in u.tensors().values()} == {torch.float16}
    assert half.embeddings["<s1>"].dtype == torch.float16


def test_models_and_checkpoints_do_not_take_them_in_silence(tmp_path):
    import tiny

    model = tiny.mlp()
    whole = Dense(torch.ones(20, 10))
    with pytest.raises(AdapterError, match=r"an update of kind 'dense'.*\n.*resize"):
        lk.attach(model, lk.Adapter(lk.LoraConfig(), {"lin0": whole}))
    with pytest.raises(AdapterError, match=r"a DoRA over an update of kind 'dense'.*\n.*lorakit merge"):
        lk.attach(model, lk.Adapter(lk.LoraConfig(), {"lin0": Dora(whole, torch.ones(20, 1))}))


@pytest.mark.parametrize("shape, fine", [((5, 1), True), ((1, 6), True), ((5,), False), ((6, 1), False)])
def test_a_doras_magnitude_has_a_number_for_each_output_or_each_input(shape, fine):
    f = Dora(lk.Factors(randn(2, 6), randn(5, 2), 2.0), torch.ones(shape))
    if fine:
        f.check("m")
        with pytest.raises(AdapterError, match="depends on the base"):
            f.delta()
    else:
        with pytest.raises(AdapterError, match="magnitude"):
            f.check("m")
