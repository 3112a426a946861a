"""`export(verify=True)` checks every quantity in a written file: the tests damage each one after it is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapter.dense import Dense
from lorakit.adapter.dora import Dora
from lorakit.adapter.loha import Loha
from lorakit.adapter.lokr import Lokr
from lorakit.errors import AdapterError
from lorakit.export import export
from lorakit.formats import save

Q, V, FC = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
CONV, NORM = "unet.conv_in", "unet.down_blocks.0.resnets.0.norm1"
NUMBERS = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=NUMBERS)


def low_rank(rank: int, alpha: float, out: int = 12, size_in: int = 8) -> lk.Factors:
    return lk.Factors(random(rank, size_in), random(out, rank), alpha)


def adapter(updates: dict, saved: dict | None = None, **config) -> lk.Adapter:
    targets = sorted({m.rsplit(".", 1)[-1] for m in updates}) or ["q_proj"]
    return lk.Adapter(lk.LoraConfig(**{"rank": 4, "alpha": 8, "targets": targets} | config), updates, saved or {})


def dora() -> Dora:
    return Dora(low_rank(4, 8), random(12, 1).abs() + 0.5)


TUCKER = (random(2, 2, 3, 3), random(2, 320), random(2, 4))
LANGUAGE = adapter({Q: low_rank(4, 6), V: low_rank(3, 5), FC: low_rank(3, 1)}, rslora=False)
TOKENS = lk.Factors(random(4, 40), random(8, 4), 8.0, "embedding")
HEADED = adapter(
    {Q: low_rank(4, 8), "model.embed_tokens": TOKENS},
    {"score.weight": random(3, 12), f"{Q}.bias": random(12)},
    save_modules=["score"],
    bias="lora_only",
)
DORA = adapter({Q: dora(), V: dora()})
IMAGE = adapter(
    {
        UNET + "to_q": Loha(random(320, 2), random(2, 320), random(320, 2), random(2, 320), 3.0),
        UNET + "to_k": Lokr(3.0, w1=random(4, 4), w2a=random(80, 2), w2b=random(2, 80)),
        UNET + "to_v": Lokr(1.0, w1=random(4, 4), w2=random(80, 80)),
        UNET + "to_out.0": Dense(random(320, 320), random(320)),
        CONV: Loha(TUCKER[1], TUCKER[2], random(2, 320), random(2, 4), 2.0, TUCKER[0], random(2, 2, 3, 3)),
        "unet.down_blocks.0.resnets.0.conv1": Lokr(
            4.0, w1=random(4, 4), w2a=random(2, 80), w2b=random(2, 80), t2=random(2, 2, 3, 3)
        ),
        NORM: Dense(random(320), random(320)),
        "unet.conv_out": Dora(lk.Factors(random(2, 320, 3, 3), random(4, 2, 1, 1), 3.0, "conv"), random(4, 1)),
        "unet.mid_block.attentions.0.proj_in": Dora(
            lk.Factors(random(2, 1280, 1, 1), random(1280, 2, 1, 1), 3.0, "conv"), random(1, 1280)
        ),
    }
)
IMAGE_DORA = adapter(
    {
        UNET + "to_q": Dora(low_rank(2, 3, 320, 320), random(320, 1)),
        CONV: Dora(lk.Factors(random(2, 4, 3, 3), random(320, 2, 1, 1), 3.0, "conv"), random(320, 1)),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": Dora(low_rank(2, 3, 768, 768), random(768, 1)),
    }
)
PLAIN_IMAGE = adapter({UNET + "to_q": low_rank(2, 3, 320, 320), UNET + "to_k": low_rank(4, 1, 320, 320)})
LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "hidden_size": 8,
}


@pytest.mark.parametrize(
    "value, receiver, kinds",
    [
        (LANGUAGE, "peft", {"ΔW"}),
        (HEADED, "peft", {"ΔW", "saved weights"}),
        (DORA, "peft", {"ΔW", "DoRA's magnitudes"}),
        (DORA, "mlx", {"ΔW", "DoRA's magnitudes"}),
        (IMAGE_DORA, "diffusers", {"ΔW", "DoRA's magnitudes"}),
        (IMAGE, "comfyui", {"ΔW", "DoRA's magnitudes", "changes of biases"}),
        (IMAGE, "a1111", {"ΔW", "DoRA's magnitudes", "changes of biases"}),
        (adapter({}, {"score.weight": random(3, 12)}), "peft", {"saved weights"}),
    ],
)
def test_every_quantity_of_a_file_is_compared(tmp_path, value, receiver, kinds):
    name = "x.safetensors" if receiver in ("comfyui", "a1111") else "out"
    done = export(value, tmp_path / name, receiver, verify=True)
    assert done.differences.keys() == kinds
    assert done.difference < 1e-6


def test_an_embeddings_dora_magnitudes_are_compared(tmp_path):
    across = Dora(TOKENS, random(1, 40))
    assert export(adapter({"model.embed_tokens": across}), tmp_path / "m", "mlx", verify=True).difference < 1e-6
    along = Dora(TOKENS, random(8, 1))
    assert export(adapter({"model.embed_tokens": along}), tmp_path / "p", "peft", verify=True).difference < 1e-6


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_saved_weights_of_every_dtype_are_read_exactly(tmp_path, dtype):
    value = (random(5, 7) * 40).abs().to(dtype)
    if dtype.itemsize == 1 and dtype.is_floating_point:  # every value of the dtype
        value = torch.arange(256, dtype=torch.uint8).view(dtype)
        value = value[value.float().isfinite()]
    done = export(
        adapter({}, {"score.weight": value, "score.count": value[0].clone()}), tmp_path / "out", "peft", verify=True
    )
    assert done.difference == 0


def test_grouped_convolutions_and_packed_projections_are_verified(tmp_path):
    conv = lk.Factors(random(2, 4, 3), random(6, 2, 1), 3.0, "conv", groups=2)
    theirs = lk.Factors(random(4, 8, 3), random(6, 2, 1), 3.0, "conv", groups=2)
    B = torch.zeros(12, 4)
    B[:4, :2], B[8:, 2:] = random(4, 2), random(4, 2)
    packed = lk.Factors(random(4, 8), B, 5.0, parts=(True, False, True))
    done = export(adapter({"a.conv": conv, "b.conv": theirs, "c.qkv": packed}), tmp_path / "out", "peft", verify=True)
    assert done.difference < 1e-6


def edited(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Damage: change the tensors of a safetensors file and write it again."""

    def damage(path: Path) -> None:
        file = next(f for f in (path, path / "adapter_model.safetensors", path / "adapters.safetensors") if f.is_file())
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata)

    return damage


def flipped(key: str) -> Callable[[Path], None]:
    """Damage: flip the sign of a tensor's largest element."""

    def change(tensors: dict) -> None:
        tensor = tensors[next(k for k in tensors if k.endswith(key))].view(-1)
        at = int(tensor.abs().argmax())
        tensor[at] = -tensor[at]

    return edited(change)


def json_value(file: str, *keys: str, value) -> Callable[[Path], None]:
    """Damage: change a value in a JSON file."""

    def damage(path: Path) -> None:
        values = json.loads((path / file).read_text())
        inner = values
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (path / file).write_text(json.dumps(values))

    return damage


def without(end: str) -> Callable[[Path], None]:
    return edited(lambda tensors: tensors.pop(next(k for k in tensors if k.endswith(end))))


def more(key: str) -> Callable[[Path], None]:
    return edited(lambda tensors: tensors.update({key: torch.ones(2, 2)}))


def header(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Damage: change the header of a diffusers file."""

    def damage(path: Path) -> None:
        file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        values = json.loads(metadata["lora_adapter_metadata"])
        change(values)
        save_file(load_file(file), file, metadata | {"lora_adapter_metadata": json.dumps(values)})

    return damage


def bytes_of(tensor: str) -> Callable[[Path], None]:
    """Damage: flip the sign of the largest element of a GGUF tensor."""

    def damage(path: Path) -> None:
        found = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor)
        numbers = np.memmap(path, np.float32, "r+", found.data_offset, (int(found.n_elements),))
        numbers[int(np.abs(numbers).argmax())] *= -1
        numbers.flush()

    return damage


def rows_in_transformers_order(path: Path) -> None:
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight.lora_b")
    out, rank = found.shape[1], found.shape[0]
    numbers = np.memmap(path, np.float32, "r+", found.data_offset, (int(out), int(rank)))
    numbers[:] = np.array(numbers).reshape(3, out // 6, 2, rank).swapaxes(1, 2).reshape(out, rank)
    numbers.flush()


def no_alpha(path: Path) -> None:
    """Damage: set alpha to 0, for which llama.cpp uses a scale of 1."""
    field = gguf.GGUFReader(path, "r+").fields["adapter.lora.alpha"]
    field.parts[field.data[0]][0] = 0
    field.parts[field.data[0]].base.flush()


ATTN, OUT0, RES = "attn1_to_", "attn1_to_out_0", "resnets_0_conv1"
DAMAGES = {
    "peft: a factor": (LANGUAGE, "peft", flipped("lora_B.weight"), "ΔW by"),
    "peft: an embedding's factor": (HEADED, "peft", flipped("lora_embedding_A"), "ΔW by"),
    "peft: alpha": (LANGUAGE, "peft", json_value("adapter_config.json", "lora_alpha", value=7), "ΔW by"),
    "peft: the rule for the scale": (
        LANGUAGE,
        "peft",
        json_value("adapter_config.json", "use_rslora", value=True),
        "ΔW by",
    ),
    "peft: a rank": (
        LANGUAGE,
        "peft",
        json_value("adapter_config.json", "rank_pattern", value={}),
        r"its config says 3|its config says 4",
    ),
    "peft: no config": (LANGUAGE, "peft", lambda path: (path / "adapter_config.json").unlink(), "malformed"),
    "peft: half a pair": (LANGUAGE, "peft", without("lora_B.weight"), "malformed"),
    "peft: the other half": (LANGUAGE, "peft", without("lora_A.weight"), "has no counterpart"),
    "peft: an extra module": (LANGUAGE, "peft", more("base_model.model.more.weight"), "has unexpected content"),
    "peft: a magnitude": (DORA, "peft", flipped("lora_magnitude_vector"), "DoRA's magnitudes by"),
    "peft: no magnitude": (DORA, "peft", without("lora_magnitude_vector"), "has no lora_magnitude_vector"),
    "peft: a plain LoRA after all": (
        DORA,
        "peft",
        json_value("adapter_config.json", "use_dora", value=False),
        "use_dora is False",
    ),
    "peft: a saved bias": (HEADED, "peft", flipped("base_layer.bias"), "saved weights by"),
    "peft: a saved module": (HEADED, "peft", flipped("score.weight"), "saved weights by"),
    "peft: no saved module": (HEADED, "peft", without("score.weight"), r"lacks score.weight \(saved weights\)"),
    "mlx: a factor": (LANGUAGE, "mlx", flipped("lora_b"), "ΔW by"),
    "mlx: the scale": (DORA, "mlx", json_value("adapter_config.json", "lora_parameters", "scale", value=20.0), "ΔW by"),
    "mlx: a magnitude": (DORA, "mlx", flipped(".m"), "DoRA's magnitudes by"),
    "mlx: an extra tensor": (DORA, "mlx", more("what.weight"), "'what.weight' does not belong to any update"),
    "kohya: alpha": (IMAGE, "comfyui", flipped(f"{ATTN}q.alpha"), "ΔW by"),
    "kohya: a LoHa": (IMAGE, "comfyui", flipped(f"{ATTN}q.hada_w2_b"), "ΔW by"),
    "kohya: a LoHa's core": (IMAGE, "comfyui", flipped("conv_in.hada_t1"), "ΔW by"),
    "kohya: a LoKr's first factor": (IMAGE, "comfyui", flipped(f"{ATTN}v.lokr_w1"), "ΔW by"),
    "kohya: a LoKr's product": (IMAGE, "comfyui", flipped(f"{ATTN}k.lokr_w2_a"), "ΔW by"),
    "kohya: a LoKr's core": (IMAGE, "comfyui", flipped(f"{RES}.lokr_t2"), "ΔW by"),
    "kohya: a dense ΔW": (IMAGE, "comfyui", flipped(f"{OUT0}.diff"), "ΔW by"),
    "kohya: a bias": (IMAGE, "comfyui", flipped(f"{OUT0}.diff_b"), "changes of biases by"),
    "kohya: a norm": (IMAGE, "comfyui", flipped("norm1.w_norm"), "ΔW by"),
    "kohya: a norm's bias": (IMAGE, "comfyui", flipped("norm1.b_norm"), "changes of biases by"),
    "kohya: a magnitude": (IMAGE, "a1111", flipped("conv_out.dora_scale"), "DoRA's magnitudes by"),
    "kohya: half a LoHa": (IMAGE, "comfyui", without(f"{ATTN}q.hada_w2_b"), "malformed"),
    "kohya: an unknown kind": (IMAGE, "comfyui", more("lora_unet_conv_in.oft_blocks"), "does not belong to any kind"),
    "diffusers: a factor": (
        PLAIN_IMAGE,
        "diffusers",
        lambda path: flipped("lora_A.weight")(next(path.glob("*.safetensors"))),
        "ΔW by",
    ),
    "diffusers: alpha": (
        PLAIN_IMAGE,
        "diffusers",
        header(lambda values: values.update({"unet.lora_alpha": 9})),
        "ΔW by",
    ),
    "diffusers: a module's own alpha": (
        PLAIN_IMAGE,
        "diffusers",
        header(lambda values: values.update({"unet.alpha_pattern": {}})),
        "ΔW by",
    ),
    "diffusers: a magnitude": (
        IMAGE_DORA,
        "diffusers",
        lambda path: flipped("to_q.lora_magnitude_vector")(next(path.glob("*.safetensors"))),
        "DoRA's magnitudes by",
    ),
    "diffusers: no DoRA after all": (
        IMAGE_DORA,
        "diffusers",
        header(lambda values: values.update({"unet.use_dora": False})),
        "use_dora is False",
    ),
    "gguf: a factor": (LANGUAGE, "llama.cpp", bytes_of("blk.1.attn_v.weight.lora_a"), "ΔW by"),
    "gguf: alpha": (LANGUAGE, "llama.cpp", no_alpha, "ΔW by"),
    "gguf: the order of rows": (LANGUAGE, "llama.cpp", rows_in_transformers_order, "ΔW by"),
}
NAMES = {"comfyui": "x.safetensors", "a1111": "x.safetensors", "llama.cpp": "x.gguf"}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_detected_and_out_is_unchanged(tmp_path, monkeypatch, kind):
    value, receiver, damage, said = DAMAGES[kind]
    out = tmp_path / NAMES.get(receiver, "out")
    base = LLAMA if receiver == "llama.cpp" else None

    def save_and_damage(adapter, path, format, **options):
        written = save(adapter, path, format, **options)
        damage(written if written.name != "pytorch_lora_weights.safetensors" else written.parent)
        return written

    monkeypatch.setattr(sys.modules["lorakit.export.staging"], "save", save_and_damage)
    with pytest.raises(AdapterError, match=said) as error:
        export(value, out, receiver, verify=True, base=base)
    assert str(out) in str(error.value), "the message names OUT, not the temporary folder"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("receiver", ["peft", "mlx", "diffusers", "comfyui"])
def test_a_failed_export_keeps_the_previous_one(tmp_path, monkeypatch, receiver):
    value = PLAIN_IMAGE if receiver in ("diffusers", "comfyui") else LANGUAGE
    out = tmp_path / NAMES.get(receiver, "out")
    export(value, out, receiver)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(sys.modules["lorakit.export.verify"], "differences", lambda *_: {"ΔW": float("nan")})
    with pytest.raises(AdapterError, match=r"differs from the adapter: ΔW by nan[^\n]*\n  OUT is unchanged"):
        export(value * 2.0, out, receiver, verify=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    export(value * 2.0, out, receiver, verify=True)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after.keys() == before.keys()
    assert after != before


def test_other_files_in_the_folder_stay_except_pefts_old_weights(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    (out / "adapter_model.bin").write_bytes(b"old")
    export(LANGUAGE, out, "peft", verify=True)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakit.json",
    ]


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(AdapterError, match="is a folder; expected a file name"):
        export(IMAGE, tmp_path / "x.safetensors", "comfyui", verify=True)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(AdapterError, match="is a file; expected a folder name"):
        export(LANGUAGE, tmp_path / "out", "peft", verify=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_the_first_matching_pattern_applies_as_in_peft(tmp_path):
    """In file order: if "q_proj" comes before "layers.1.q_proj", it applies to both."""
    pattern = {"alpha_pattern": {"q_proj": 2, "model.layers.1.self_attn.q_proj": 5}, "alpha": 4.0}
    other = "model.layers.1.self_attn.q_proj"
    value = adapter({Q: low_rank(4, 2), other: low_rank(4, 5), V: low_rank(4, 4)}, **pattern)
    assert export(value, tmp_path / "out", "peft", verify=True).difference < 1e-6


def test_a_small_modules_wrong_scale_is_detected_next_to_a_large_module(tmp_path, monkeypatch):
    small = replace(low_rank(4, 8), A=random(4, 8) * 1e-4)
    value = adapter({Q: low_rank(4, 8), V: small})

    def save_and_damage(adapter, path, format, **options):
        return save(
            replace(adapter, updates={**adapter.updates, V: replace(small, alpha=7.9)}), path, format, **options
        )

    monkeypatch.setattr(sys.modules["lorakit.export.staging"], "save", save_and_damage)
    with pytest.raises(AdapterError, match="ΔW by"):
        export(value, tmp_path / "out", "peft", verify=True)


def test_shift_and_scale_are_swapped_for_fluxs_last_norm(tmp_path):
    """Flux's original code, and so kohya's file, has the two halves of the rows swapped."""
    name = "transformer.norm_out.linear"
    whole = adapter({name: Dense(random(12, 6), random(12))})
    whole = replace(whole, metadata={"model": "flux"})
    assert export(whole, tmp_path / "x.safetensors", "comfyui", verify=True).difference == 0
    written = load_file(tmp_path / "x.safetensors")
    assert torch.equal(written["lora_unet_final_layer_adaLN_modulation_1.diff"][:6], whole.updates[name].weight[6:])


def test_fused_keys_of_other_kinds_are_compared(tmp_path):
    attention = "transformer.transformer_blocks.0.attn."
    shared = {"w2": random(6, 4)}
    lokr = {attention + n: Lokr(1.0, w1=random(2, 2), **shared) for n in ("to_q", "to_k", "to_v")}
    value = replace(adapter(lokr), metadata={"model": "flux"})
    assert export(value, tmp_path / "x.safetensors", "comfyui", verify=True).difference < 1e-6
    two = {attention + n: low_rank(2, 3) for n in ("to_q", "to_v")}
    value = replace(adapter(two), metadata={"model": "flux"})
    assert export(value, tmp_path / "y.safetensors", "comfyui", verify=True).difference < 1e-6
