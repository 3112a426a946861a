"""From every format to every other and back: each module keeps its ΔW, or the conversion is refused and says why."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damaged import LANGUAGE, LLAMA, TEXT, UNET
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit import formats
from lorakit.adapter.dora import Dora
from lorakit.errors import AdapterError
from lorakit.formats.convert import convert
from lorakit.formats.loralib import alpha_of

LANGUAGE_FORMATS = ("peft", "loralib", "mlx", "gguf")
IMAGE_FORMATS = ("peft", "kohya", "diffusers", "cloneofsimo")
SIZES = {
    LANGUAGE + "q_proj": (8, 8),
    LANGUAGE + "k_proj": (8, 8),
    "model.layers.0.mlp.down_proj": (12, 8),
    UNET + "to_q": (320, 320),
    UNET + "to_k": (320, 320),
    TEXT + "q_proj": (768, 768),
    TEXT + "v_proj": (768, 768),
}
CONV = "unet.down_blocks.0.resnets.0.conv1"  # [320, 320, 3, 3]
ALPHA = 4.0  # what is given for files that do not hold it
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def adapters(draw, names: tuple[str, ...], conv: bool = False) -> lk.Adapter:
    """Ranks and alphas of their own, rsLoRA or not, one precision."""
    rslora, dtype, factors = draw(st.booleans()), draw(dtypes), {}
    for name in names:
        rank, alpha = draw(st.integers(1, 5)), draw(st.sampled_from([0.5, 1.0, 3.0, 8.0]))
        made = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        size_in, size_out = SIZES[name]
        A, B = torch.randn(rank, size_in, generator=made), torch.randn(size_out, rank, generator=made)
        factors[name] = lk.Factors(A.to(dtype), B.to(dtype), alpha, rslora=rslora)
    if conv:
        made = torch.Generator().manual_seed(7)
        A, B = torch.randn(2, 320, 3, 3, generator=made), torch.randn(320, 2, 1, 1, generator=made)
        factors[CONV] = lk.Factors(A.to(dtype), B.to(dtype), 3.0, "conv", rslora=rslora)
    return lk.Adapter(
        lk.LoraConfig(rank=2, alpha=ALPHA, rslora=rslora, targets=sorted({n.rsplit(".", 1)[-1] for n in factors})),
        factors,
    )


def written(adapter: lk.Adapter, format: str, folder: Path, name: str, keep_alpha: bool = False) -> lk.Adapter:
    """In that format, and read again."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(json.dumps(LLAMA))
    suffix = {"peft": "", "mlx": "", "loralib": ".pt", "gguf": ".gguf"}.get(format, ".safetensors")
    done = convert(adapter, folder / f"{name}{suffix}", format, base=base, keep_alpha=keep_alpha)
    assert done.lost == []
    assert formats.format_of(done.path) == format
    alpha = {"alpha": alpha_of(adapter)} if format == "loralib" else {}
    return formats.load(done.path, base=base, **alpha)


def assert_same(found: lk.Adapter, expected: lk.Adapter, folds: int) -> None:
    """Equal ΔW. `folds`: how many times a strength may have been rounded into a factor."""
    assert found.factors.keys() == expected.factors.keys()
    for module, f in expected.factors.items():
        ours, theirs = found.factors[module].delta().double(), f.delta().double()
        eps = torch.finfo(f.A.dtype).eps
        assert ours.shape == theirs.shape, module
        off = float((ours - theirs).norm() / theirs.norm())
        assert off <= 1e-6 + folds * eps, f"{module}: {off:.2g}"


@pytest.mark.parametrize("one, other", itertools.product(LANGUAGE_FORMATS, repeat=2))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters((LANGUAGE + "q_proj", LANGUAGE + "k_proj", "model.layers.0.mlp.down_proj")))
def test_language_models_adapters_keep_every_update(one, other, adapter):
    with tempfile.TemporaryDirectory() as name:
        first = written(adapter, one, Path(name), "one")
        assert_same(first, adapter, folds=1)
        second = written(first, other, Path(name), "other")
        assert_same(second, adapter, folds=2)
        assert_same(written(second, one, Path(name), "again"), adapter, folds=3)


@pytest.mark.parametrize("one, other", itertools.product(IMAGE_FORMATS, repeat=2))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_image_models_adapters_keep_every_update(one, other, data):
    conv = "cloneofsimo" not in (one, other)
    adapter = data.draw(adapters((UNET + "to_q", UNET + "to_k", TEXT + "q_proj", TEXT + "v_proj"), conv))
    with tempfile.TemporaryDirectory() as name:
        first = written(adapter, one, Path(name), "one")
        second = written(first, other, Path(name), "other")
        assert_same(second, adapter, folds=2)


EXACT = [("peft", "diffusers"), ("peft", "kohya"), ("kohya", "diffusers")]


@pytest.mark.parametrize("one, other", EXACT)
def test_formats_that_hold_alphas_keep_every_bit_of_the_factors(one, other, tmp_path):
    torch.manual_seed(1)
    factors = {
        n: lk.Factors(torch.randn(r, SIZES[n][0]).half(), torch.randn(SIZES[n][1], r).half(), a)
        for n, r, a in ((UNET + "to_q", 2, 1.0), (UNET + "to_k", 4, 3.0))
    }
    adapter = lk.Adapter(lk.LoraConfig(rank=2, alpha=1, targets=["to_q", "to_k"]), factors)
    again = written(written(adapter, one, tmp_path, "one", True), other, tmp_path, "other", True)
    for module, f in factors.items():
        now = again.factors[module]
        assert torch.equal(now.A, f.A)
        assert torch.equal(now.B, f.B)
        assert math.isclose(now.scale, f.scale)


DORA = [*itertools.permutations(("peft", "kohya", "diffusers"), 2), ("peft", "mlx")]


@pytest.mark.parametrize("one, other", DORA)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_doras_magnitude_is_kept_to_the_bit_where_a_format_has_a_place_for_it(one, other, data):
    names = ("model.layers.0.mlp.down_proj",) if other == "mlx" else (UNET + "to_q", TEXT + "q_proj")
    plain = data.draw(adapters(names, conv=other != "mlx"))
    made = torch.Generator().manual_seed(3)
    doras = {m: Dora(f, torch.rand(f.B.shape[0], 1, generator=made) + 0.5) for m, f in plain.factors.items()}
    with tempfile.TemporaryDirectory() as name:
        first = written(replace(plain, updates=doras), one, Path(name), "one", keep_alpha=True)
        second = written(first, other, Path(name), "other", keep_alpha=True)
    for module, dora in doras.items():
        assert torch.equal(second.updates[module].magnitude, dora.magnitude)
        found, f = second.factors[module], dora.inner
        low, wanted = (g.scale * g.B.flatten(1).double() @ g.A.flatten(1).double() for g in (found, f))
        # MLX has one strength: the others are rounded into B
        folded = torch.finfo(f.A.dtype).eps if other == "mlx" else 0
        assert float((low - wanted).norm() / wanted.norm()) <= 1e-9 + folded


def test_what_a_format_cannot_hold_is_refused_and_listed_or_left_out_if_that_is_allowed(tmp_path):
    torch.manual_seed(1)
    f = lk.Factors(torch.randn(2, 8), torch.randn(8, 2), 2.0)
    adapter = lk.Adapter(
        lk.LoraConfig(rank=2, alpha=2, targets=["q_proj"]),
        {LANGUAGE + "q_proj": f},
        {"model.norm.weight": torch.ones(8)},
        embeddings={"<s>": torch.ones(8)},
    )
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(
        AdapterError,
        match=r"gguf cannot hold all of this adapter(.|\n)*saved weights(.|\n)*embeddings(.|\n)*--allow-loss",
    ):
        convert(adapter, tmp_path / "x.gguf", "gguf", base=tmp_path / "base")
    assert not (tmp_path / "x.gguf").exists()
    done = convert(adapter, tmp_path / "x.gguf", "gguf", base=tmp_path / "base", allow_loss=True)
    assert len(done.lost) == 2
    left = formats.load(done.path, base=tmp_path / "base")
    assert (list(left.factors), dict(left.saved), dict(left.embeddings)) == ([LANGUAGE + "q_proj"], {}, {})


def test_an_adapter_of_which_nothing_fits_is_refused_also_when_loss_is_allowed(tmp_path):
    f = lk.Factors(torch.randn(2, 8), torch.randn(8, 2), 2.0)
    adapter = lk.Adapter(lk.LoraConfig(rank=2, alpha=2, targets=["q_proj"]), {LANGUAGE + "q_proj": f})
    with pytest.raises(AdapterError):
        convert(adapter, tmp_path / "x.safetensors", "kohya", allow_loss=True)
    assert list(tmp_path.iterdir()) == []
