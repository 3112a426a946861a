"""LyCORIS' less common tensors: decomposed LoHa and LoKr, scalars, biases, whole changes, other methods."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit import formats
from lorakit.adapter.biased import Biased
from lorakit.adapter.dora import Dora
from lorakit.errors import AdapterError
from lorakit.formats import lycoris

FLAT, DOTTED = "lora_unet_net_0_proj", "diffusion_model.net.0.proj"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LOHA = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 8)}
LOKR = {"lokr_w1": (3, 2), "lokr_w2": (4, 4)}
LORA = {"lora_down.weight": (2, 8), "lora_up.weight": (12, 2)}


def made(shapes, **more):
    return {name: random(*shape) for name, shape in shapes.items()} | more


@pytest.mark.parametrize("kind", [LOHA, LOKR, LORA], ids=["loha", "lokr", "lora"])
@pytest.mark.parametrize("by_output", [True, False])
def test_a_decomposed_update_of_each_kind_is_lycoris_own_formula(kind, by_output):
    """LyCORIS' `apply_weight_decompose`: (W + ΔW) · dora_scale / ‖W + ΔW‖, over rows or over columns."""
    scale = random(12, 1).abs() if by_output else random(1, 8).abs()
    plain = lycoris.update("k", made(kind, alpha=torch.tensor(1.0)), (12, 8))
    found = lycoris.update("k", made(kind, alpha=torch.tensor(1.0), dora_scale=scale), (12, 8))
    found.check("k")
    assert isinstance(found, Dora)
    assert type(found.inner) is type(plain)
    W = random(12, 8)
    merged = W + plain.delta()
    norm = merged.norm(dim=1, keepdim=True) if by_output else merged.norm(dim=0, keepdim=True)
    change = found.rows((12, 8), read=lambda: [(slice(0, 12), W)])(slice(0, 12), W)
    torch.testing.assert_close((W + change).float(), merged * scale / norm, atol=1e-5, rtol=1e-5)
    again = lycoris.tensors_of("k", found, (12, 8))
    assert torch.equal(again["k.dora_scale"], scale)


@pytest.mark.parametrize("kind", [LOHA, LOKR, LORA], ids=["loha", "lokr", "lora"])
def test_lycoris_scalar_scales_the_change(kind):
    plain = lycoris.update("k", made(kind, alpha=torch.tensor(1.0)), (12, 8))
    for scalar in (0.25, -3.0):
        found = lycoris.update("k", made(kind, alpha=torch.tensor(1.0), scalar=torch.tensor(scalar)), (12, 8))
        torch.testing.assert_close(found.delta(), scalar * plain.delta())
    with pytest.raises(AdapterError, match=r"k\.scalar' has shape \[2\]"):
        lycoris.update("k", made(kind, scalar=torch.ones(2)), (12, 8))


@pytest.mark.parametrize(
    "suffix, shape, said",
    [
        ("oft_blocks", (4, 3, 3), "OFT"),
        ("oft_diag", (4, 3, 3), "OFT"),
        ("a1.weight", (2, 8), "GLoRA"),
        ("bm1.weight", (2, 8), "GLoRA"),
        ("rs_lora", (), "rs_lora"),
        ("on_input", (), r"\(IA\)"),
        ("set_weight", (12, 8), "set_weight"),
        ("reshape_weight", (2,), "reshape_weight"),
    ],
)
@pytest.mark.parametrize("name", [FLAT, DOTTED])
def test_other_methods_are_refused_by_name_with_a_way_out(name, suffix, shape, said, tmp_path):
    pair = {f"{name}.{s}": t for s, t in made(LORA).items()}
    save_file(pair | {f"{name}.{suffix}": torch.ones(shape)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=rf"(?s){suffix}.*{said}.*lorakit extract"):
        lk.Adapter.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", [FLAT, DOTTED])
def test_whole_changes_of_unknown_modules_have_the_tensors_own_shape(name, tmp_path):
    tensors = {f"{name}.{s}": t for s, t in made(LORA).items()} | {
        f"{name}_norm.diff": random(64),
        f"{name}_modulation.diff": random(1, 6, 64),
        f"{name}_patch.diff": random(4, 3, 1, 2, 2),
        f"{name}_patch.diff_b": random(4),
        f"{name}_only.diff_b": random(7),
    }
    source = tmp_path / "x.safetensors"
    save_file(tensors, source)
    adapter = lk.Adapter.load(source)
    assert adapter.updates[f"{name}_modulation"].weight_shape() == (1, 6, 64)
    again = load_file(formats.save_as_read(adapter, tmp_path / "y.safetensors", formats.format_of(source)))
    renamed = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B") for k in tensors}
    plain = {k.replace("w_norm", "diff").replace("b_norm", "diff_b") for k in again if not k.endswith(".alpha")}
    assert plain in (renamed, tensors.keys())
    for key, tensor in tensors.items():
        assert any(torch.equal(tensor, other) for other in again.values()), key


def test_a_pair_beside_a_bias_is_resized_scaled_and_combined_without_losing_it(tmp_path):
    bias = random(12)
    tensors = {f"{DOTTED}.{s}": t for s, t in made(LORA, diff_b=bias).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = lk.Adapter.load(tmp_path / "x.safetensors")
    update = adapter.updates[DOTTED]
    assert isinstance(update, Biased)
    assert torch.equal((2.0 * adapter).updates[DOTTED].bias, 2 * bias)
    small = adapter.resize(rank=1).updates[DOTTED]
    assert (small.rank, torch.equal(small.bias, bias)) == (1, True)
    both = (adapter + adapter).updates[DOTTED]
    torch.testing.assert_close(both.delta(), 2 * update.delta())
    torch.testing.assert_close(both.tensors()["bias"], 2 * bias)
    for format in ("loralib", "mlx", "cloneofsimo"):
        assert formats.losses(adapter, format)


def test_factors_in_eight_bits_are_read_as_the_numbers_that_they_are(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensors = {f"{DOTTED}.{s}": t.to(dtype) for s, t in made(LORA, diff_b=random(12)).items()}
        save_file(tensors, tmp_path / "x.safetensors")
        update = lk.Adapter.load(tmp_path / "x.safetensors").updates[DOTTED]
        down, up = (tensors[f"{DOTTED}.lora_{w}.weight"].float() for w in ("down", "up"))
        torch.testing.assert_close(update.delta(), up @ down)
