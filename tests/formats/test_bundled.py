"""Textual-inversion embeddings in LoRA files and files of their own, by the rules of A1111, ComfyUI and diffusers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import WIDTH, draw, tiny_sd1, tiny_sdxl
from torch import Tensor

import lorakit as lk
from lorakit import formats
from lorakit.errors import AdapterError
from lorakit.formats import bundled

MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ONE = {"sks": torch.arange(6.0).reshape(2, 3), "<s1>": torch.ones(3)}
TWO = {"sks.clip_l": torch.ones(2, 3), "sks.clip_g": torch.ones(2, 5)}


def adapter(embeddings: dict[str, Tensor]) -> lk.Adapter:
    update = lk.Factors(torch.ones(2, 8), torch.ones(8, 2), 2.0)
    config = lk.LoraConfig(rank=2, alpha=2, targets=["to_q"])
    return lk.Adapter(config, {MODULE: update}, embeddings=embeddings)


def by_a1111(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """token -> its vectors, by the rules of A1111 (`load_network`, `create_embedding_from_data`)."""
    bundles: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        front, _, part = key.partition(".")
        if front == "bundle_emb":
            token, vector = part.split(".", 1)
            one = {vector.split(".", 1)[1]: tensor} if vector.split(".")[0] == "string_to_param" else tensor
            bundles.setdefault(token, {})[vector.split(".")[0]] = one
    found: dict[str, Any] = {}
    for token, data in bundles.items():
        if "string_to_param" in data:
            (found[token],) = data["string_to_param"].values()
        else:
            assert {"clip_g", "clip_l"} <= data.keys()
            found[token] = data
    return found


def by_comfyui(tensors: dict[str, Tensor], part: str = "clip_l") -> Tensor:
    """The vectors of a file in models/embeddings, by the rules of ComfyUI (sd1_clip.load_embed)."""
    if part in tensors:
        return tensors[part]
    for end in (".string_to_param.*", f".{part}"):
        rows = [t for key, t in tensors.items() if key.startswith("bundle_emb.") and key.endswith(end)]
        if rows:
            return torch.cat(rows)
    return next(iter(tensors.values()))


def test_a1111_finds_one_token_for_each_bundle(tmp_path):
    tensors = load_file(adapter(ONE).save(tmp_path / "x.safetensors", "kohya"))
    found = by_a1111(tensors)
    assert torch.equal(found["sks"], ONE["sks"])
    assert torch.equal(found["<s1>"], ONE["<s1>"][None])  # its rows are vectors
    both = by_a1111(load_file(adapter(TWO).save(tmp_path / "y.safetensors", "kohya")))["sks"]
    assert torch.equal(both["clip_l"], TWO["sks.clip_l"])
    assert torch.equal(both["clip_g"], TWO["sks.clip_g"])


@pytest.mark.parametrize("embeddings", [ONE, TWO], ids=["one encoder", "two encoders"])
@pytest.mark.parametrize("alone", [False, True])
def test_they_come_back_with_the_adapter_or_alone(embeddings, alone, tmp_path):
    value = replace(adapter(embeddings), updates={}) if alone else adapter(embeddings)
    path = value.save(tmp_path / "x.safetensors", "kohya")
    assert formats.format_of(path) == "kohya"
    again = lk.Adapter.load(path)
    assert again.updates.keys() == value.updates.keys()
    assert again.embeddings.keys() == embeddings.keys()
    for name, vectors in embeddings.items():
        assert torch.equal(again.embeddings[name].squeeze(0), vectors.squeeze(0))


def test_comfyui_reads_a_copy_of_the_file_and_each_tokens_own_file(tmp_path):
    whole = load_file(adapter({"sks": ONE["sks"]}).save(tmp_path / "x.safetensors", "kohya"))
    assert torch.equal(by_comfyui(whole), ONE["sks"])
    files = bundled.own_files(ONE | {"a b": torch.zeros(1, 3)})
    assert set(files) == {"sks.safetensors", "s1.safetensors", "a-b.safetensors"}
    assert torch.equal(by_comfyui(files["sks.safetensors"]), ONE["sks"])
    (two,) = bundled.own_files(TWO).values()
    assert torch.equal(by_comfyui(two, "clip_g"), TWO["sks.clip_g"])


def test_tokens_that_differ_in_signs_or_case_alone_have_files_of_their_own():
    rows = {name: torch.full((1, 3), float(n)) for n, name in enumerate(("a", "<a>", "A", "b"))}
    files = bundled.own_files(rows)
    assert list(files) == ["a.safetensors", "a-2.safetensors", "A-3.safetensors", "b.safetensors"]
    for tensors, (name, vectors) in zip(files.values(), rows.items(), strict=True):
        assert list(tensors) == [name]
        assert torch.equal(by_comfyui(tensors), vectors)


def test_diffusers_draws_with_a_tokens_own_file_what_we_draw(tmp_path):
    vectors = 2 * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    value = lk.Adapter(lk.LoraConfig(targets=["to_q"]), {}, embeddings={"<tok>": vectors})
    ours, theirs = tiny_sd1(), tiny_sd1()
    lk.attach(ours, lk.Adapter.load(value.save(tmp_path / "x.safetensors", "kohya")))
    ((file, tensors),) = bundled.own_files(value.embeddings).items()
    save_file(tensors, tmp_path / file)
    theirs.load_textual_inversion(str(tmp_path / file))
    prompt = "a <tok> cat"
    torch.testing.assert_close(draw(theirs, prompt), draw(ours, prompt), atol=1e-5, rtol=0)
    assert (draw(ours, prompt) - draw(tiny_sd1(), prompt)).abs().max() > 1e-3


def test_sdxls_two_parts_go_to_their_encoders(tmp_path):
    made = torch.Generator().manual_seed(0)
    parts = {f"<tok>.{part}": 2 * torch.randn(1, WIDTH, generator=made) for part in ("clip_l", "clip_g")}
    value = lk.Adapter(lk.LoraConfig(targets=["to_q"]), {}, embeddings=parts)
    ours, theirs = tiny_sdxl(), tiny_sdxl()
    lk.attach(ours, lk.Adapter.load(value.save(tmp_path / "x.safetensors", "kohya")))
    (file,) = bundled.own_files(parts).values()
    for part, end in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(theirs, f"text_encoder{end}"), getattr(theirs, f"tokenizer{end}")
        theirs.load_textual_inversion(file[part], token="<tok>", text_encoder=encoder, tokenizer=tokenizer)
    torch.testing.assert_close(draw(theirs, "a <tok>"), draw(ours, "a <tok>"), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "embeddings, said",
    [
        ({"v1.5": torch.ones(3)}, "first dot"),
        ({"": torch.ones(3)}, "first dot"),
        ({"sks": torch.ones(2, 2, 3)}, r"shape \[2, 2, 3\]"),
    ],
)
def test_a_token_that_no_program_would_find_is_refused(embeddings, said, tmp_path):
    with pytest.raises(AdapterError, match=said):
        adapter(embeddings).save(tmp_path / "x.safetensors", "kohya")
    assert not list(tmp_path.iterdir())
    assert formats.losses(adapter(embeddings), "kohya")


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_formats_without_a_place_for_them_say_so(format, tmp_path):
    with pytest.raises(AdapterError, match="embeddings"):
        adapter(ONE).save(tmp_path / "x.safetensors", format)
