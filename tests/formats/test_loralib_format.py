"""loralib's checkpoints, read and written, with the real loralib as the judge."""

from __future__ import annotations

import loralib
import pytest
import tiny
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterError


class Theirs(nn.Module):
    """An MLP of loralib's own layers, with the names of `tiny.Mlp`, a packed projection first."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.lin0 = (
            loralib.MergedLinear(10, 20, r=3, lora_alpha=6, enable_lora=[True, False])
            if packed
            else loralib.Linear(10, 20, r=3, lora_alpha=6)
        )
        self.lin1 = loralib.Linear(20, 12, r=3, lora_alpha=6)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 4, bias=False)

    forward = tiny.Mlp.forward


def theirs(packed: bool = False) -> Theirs:
    model = Theirs(packed)
    model.load_state_dict(tiny.mlp().state_dict(), strict=False)
    made = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.3)
    loralib.mark_only_lora_as_trainable(model)
    return model


@pytest.mark.parametrize("packed", [None, {"lin0": [True, False]}], ids=["plain", "merged linear"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_of_loralib_gives_its_outputs_and_is_written_back_equal(packed, suffix, tmp_path):
    source = theirs(packed is not None)
    x = torch.randn(4, 10)
    expected = source.train()(x)
    torch.save(loralib.lora_state_dict(source), tmp_path / "lora.pt")
    adapter = lk.Adapter.load(tmp_path / "lora.pt", alpha=6, packed=packed)
    model = lk.attach(tiny.mlp(), adapter)
    torch.testing.assert_close(model(x), expected)
    lk.capture(model).save(tmp_path / f"ours{suffix}", format="loralib")
    again = lk.Adapter.load(tmp_path / f"ours{suffix}", alpha=6, packed=packed)
    torch.testing.assert_close(lk.attach(tiny.mlp(), again)(x), expected)
    if suffix == ".pt":
        fresh = Theirs(packed is not None)
        fresh.load_state_dict(tiny.mlp().state_dict(), strict=False)
        result = fresh.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True), strict=False)
        assert not result.unexpected_keys
        torch.testing.assert_close(fresh.train()(x), expected)


def test_biases_travel_along(tmp_path):
    source = theirs()
    loralib.mark_only_lora_as_trainable(source, bias="lora_only")
    with torch.no_grad():
        source.lin0.bias += 1
    torch.save(loralib.lora_state_dict(source, bias="lora_only"), tmp_path / "lora.pt")
    model = lk.attach(tiny.mlp(), lk.Adapter.load(tmp_path / "lora.pt", alpha=6))
    x = torch.randn(4, 10)
    torch.testing.assert_close(model(x), source.train()(x))
    lk.capture(model).save(tmp_path / "folder")
    torch.testing.assert_close(lk.attach(tiny.mlp(), lk.Adapter.load(tmp_path / "folder"))(x), source(x))


def test_an_embedding_of_loralib_attaches_and_then_knows_what_it_is(tmp_path):
    source = loralib.Embedding(20, 8, r=3, lora_alpha=6)
    nn.init.normal_(source.lora_A)
    nn.init.normal_(source.lora_B)
    torch.save({f"emb.{k}": v for k, v in loralib.lora_state_dict(source).items()}, tmp_path / "lora.pt")
    model = tiny.embedder()
    with torch.no_grad():
        model.emb.weight.copy_(source.weight)
    lk.attach(model, lk.Adapter.load(tmp_path / "lora.pt", alpha=6))
    torch.testing.assert_close(model.emb(torch.arange(20)), source(torch.arange(20)))
    assert lk.capture(model).factors["emb"].kind == "embedding"


def test_alpha_must_be_given_because_the_file_does_not_hold_it(tmp_path):
    torch.save(loralib.lora_state_dict(theirs()), tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match=r"does not hold alpha\n  give the lora_alpha it was trained with"):
        lk.Adapter.load(tmp_path / "lora.pt")


def test_a_merged_linear_needs_its_parts_named(tmp_path):
    torch.save(loralib.lora_state_dict(theirs(True)), tmp_path / "lora.pt")
    # One of two parts: A and B look like a plain update of half the size.
    with pytest.raises(AdapterError, match="do not fit 'lin0'"):
        lk.attach(tiny.mlp(), lk.Adapter.load(tmp_path / "lora.pt", alpha=6))
    both = loralib.MergedLinear(10, 20, r=3, enable_lora=[True, True])
    torch.save({f"lin0.{k}": v for k, v in loralib.lora_state_dict(both).items()}, tmp_path / "both.pt")
    with pytest.raises(AdapterError, match=r"a MergedLinear\n  say which parts are adapted, in Python: .*packed="):
        lk.Adapter.load(tmp_path / "both.pt", alpha=6)
    with pytest.raises(AdapterError, match="not 3 adapted parts"):
        lk.Adapter.load(tmp_path / "both.pt", alpha=6, packed={"lin0": [True, True, True]})


@pytest.mark.parametrize(
    "state, said",
    [
        ({"lin0.weight": torch.zeros(2, 2)}, r"no adapter in a format that lorakit knows: its tensors are lin0.weight"),
        ({"lin0.lora_A": torch.zeros(2, 10)}, "has a lora_A and no lora_B"),
        ({"lin0.lora_A": torch.zeros(2, 10, 1), "lin0.lora_B": torch.zeros(20, 2)}, "expected matrices"),
        ({"lin0.lora_A": torch.full((2, 10), float("nan")), "lin0.lora_B": torch.zeros(20, 2)}, "not finite"),
        (
            {"lin0.lora_A": torch.zeros(2, 10), "lin0.lora_B": torch.zeros(20, 2), "lin1.lora_B": torch.zeros(12, 2)},
            "lora_B and no lora_A",
        ),
    ],
)
def test_a_file_that_is_no_such_checkpoint_is_refused(state, said, tmp_path):
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match=said):
        lk.Adapter.load(tmp_path / "lora.pt", alpha=6)


def test_what_loralib_cannot_say_is_not_written(tmp_path):
    mixed = lk.capture(lk.attach(tiny.mlp(), lk.LoraConfig(rank=2, targets=["lin0"])))
    conv = lk.capture(lk.attach(tiny.cnn(), lk.LoraConfig(rank=2, targets=["conv2"])))
    with pytest.raises(AdapterError, match=r"1 convolutions \(conv2\)"):
        conv.save(tmp_path / "x.pt", format="loralib")
    with pytest.raises(AdapterError, match=r"unknown adapter format 'loralub'; did you mean 'loralib'\?"):
        mixed.save(tmp_path / "x.pt", format="loralub")
    assert not list(tmp_path.iterdir())


def test_ranks_of_their_own_are_kept(tmp_path):
    value = lk.capture(
        tiny.randomise_factors(
            lk.attach(tiny.mlp(), lk.LoraConfig(rank=3, targets=["lin0", "lin1", "head"], rank_pattern={"lin1": 2}))
        )
    )
    value.save(tmp_path / "x.pt", format="loralib")
    again = lk.Adapter.load(tmp_path / "x.pt", alpha=32)
    assert {m: f.rank for m, f in again.factors.items()} == {"lin0": 3, "lin1": 2, "head": 3}
    assert {m: again.config.rank_of(m) for m in again.factors} == {"lin0": 3, "lin1": 2, "head": 3}
    assert torch.equal(tiny.logits(lk.attach(tiny.mlp(), again)), tiny.logits(lk.attach(tiny.mlp(), value)))


def test_alphas_that_differ_become_one_and_the_rest_of_their_strength_goes_into_B(tmp_path):
    config = lk.LoraConfig(rank=2, targets=["lin0", "lin1", "head"], alpha_pattern={"lin1": 5})
    mixed = tiny.randomise_factors(lk.attach(tiny.mlp(), config))
    value = lk.capture(mixed)
    value.save(tmp_path / "x.pt", format="loralib")
    again = lk.Adapter.load(tmp_path / "x.pt", alpha=32)
    for module, f in value.factors.items():
        torch.testing.assert_close(again.factors[module].delta(), f.delta())


def test_a_scale_that_is_no_exact_fraction_is_still_one_alpha(tmp_path):
    config = lk.LoraConfig(rank=16, targets=["lin0", "lin1"], rank_pattern={"lin1": 49})  # 32 / 49 * 49 < 32
    lk.capture(lk.attach(tiny.mlp(), config)).save(tmp_path / "x.pt", format="loralib", dtype=torch.float16)
    again = lk.Adapter.load(tmp_path / "x.pt", alpha=32)
    assert {m: (f.rank, f.A.dtype) for m, f in again.factors.items()} == {
        "lin0": (16, torch.float16),
        "lin1": (49, torch.float16),
    }
