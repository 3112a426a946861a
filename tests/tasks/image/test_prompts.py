"""Captions encoded one by one and batched give what the pipeline makes of them itself."""

from __future__ import annotations

import pytest
import tiny_pipelines as tiny
import torch
from tiny_families import FAMILIES

import lorakit as lk
from lorakit.bases.pipeline import as_module
from lorakit.errors import TrainError
from lorakit.tasks.image.loss import losses, predict
from lorakit.tasks.image.objective import Objective
from lorakit.tasks.image.packing import layout_of
from lorakit.tasks.image.prompts import (
    batch_prompts,
    encode_prompts,
    row_groups,
    size_arguments,
    take_rows,
    text_prompts,
)
from lorakit.tasks.image.settings import DiffusionSettings

CAPTIONS = ["a cat", "the red dog of a sks animal", ""]
WITH_TEXT = [name for name in FAMILIES if FAMILIES[name]().text]
ENCODED = {
    "sd1": {"prompt_embeds"},
    "sdxl": {"prompt_embeds", "pooled_prompt_embeds"},
    "sd3": {"prompt_embeds", "pooled_prompt_embeds"},
    "flux": {"prompt_embeds", "pooled_prompt_embeds"},
    "chroma": {"prompt_embeds", "prompt_attention_mask"},
    "z_image": {"prompt_embeds[]"},
}


def predicted(family, prompts):
    model = as_module(family.pipe)
    layout = layout_of(model, family.latents, prompts)
    t = torch.full((3,), 0.5) * Objective.of(family.pipe.scheduler).steps
    t = t if Objective.of(family.pipe.scheduler).kind == "flow" else t.long()
    return predict(model, layout, family.latents, t, prompts)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_encoded_captions_predict_what_captions_as_text_do(name):
    family = FAMILIES[name]()
    encoded = encode_prompts(family.pipe, CAPTIONS)
    assert {frozenset(prompt) for prompt in encoded} == {frozenset(ENCODED[name])}
    with torch.no_grad():
        ours = predicted(family, batch_prompts(encoded))
        theirs = predicted(family, text_prompts(CAPTIONS))
    assert not torch.allclose(ours[0], ours[2], atol=1e-4)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_a_caption_does_not_depend_on_those_beside_it(name):
    pipe = FAMILIES[name]().pipe
    together = encode_prompts(pipe, CAPTIONS)[1]
    alone = encode_prompts(pipe, CAPTIONS[1:2])[0]
    assert all(torch.equal(together[key], alone[key]) for key in together)


def test_results_are_named_by_what_the_pipeline_does_with_them():
    """Flux.2's and Qwen-Image's text encoders are left out here; what they return is known from what they are given."""
    from lorakit.tasks.image.prompts import _result_names

    assert _result_names(FAMILIES["flux2"]().pipe) == ["prompt_embeds", None]
    assert _result_names(FAMILIES["qwen_image"]().pipe) == ["prompt_embeds", "prompt_embeds_mask"]
    assert _result_names(FAMILIES["wan"]().pipe) == ["prompt_embeds", None]
    assert _result_names(FAMILIES["sdxl"]().pipe) == ["prompt_embeds", None, "pooled_prompt_embeds", None]
    assert _result_names(FAMILIES["flux"]().pipe) == ["prompt_embeds", "pooled_prompt_embeds", None]


@pytest.mark.parametrize(
    ("name", "component", "targets"),
    [
        ("sd1", "text_encoder", ["q_proj", "fc1"]),
        ("sdxl", "text_encoder", ["q_proj", "fc1"]),
        ("sdxl", "text_encoder_2", ["q_proj", "fc1"]),
        ("sd3", "text_encoder_3", ["q", "wo"]),
        ("flux", "text_encoder_2", ["q", "wo"]),
        ("z_image", "text_encoder", ["q_proj", "up_proj"]),
    ],
)
def test_gradients_reach_a_trained_text_encoder(name, component, targets):
    family = FAMILIES[name]()
    encoder = getattr(family.pipe, component)
    lk.attach(family.pipe, lk.LoraConfig(rank=2, targets=targets, components=[component]))
    torch.manual_seed(0)
    losses(as_module(family.pipe), family.latents, text_prompts(CAPTIONS), DiffusionSettings()).sum().backward()
    reached = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()]
    first = {n for n, _ in encoder.named_parameters() if n.endswith("lora_default.B")}
    # A is zero in effect while B is zero; the last layers of Z-Image's encoder are not used.
    assert first & set(reached)
    assert len(first & set(reached)) >= len(first) // 2


# ------------------------------------------------------------------------------------- batches


def test_shorter_prompts_are_padded_where_a_mask_says_so():
    long, short = torch.ones(5, 4), torch.ones(2, 4)
    ones = torch.ones(5, dtype=torch.bool)
    batch = batch_prompts(
        [{"prompt_embeds": long, "prompt_embeds_mask": ones}, {"prompt_embeds": short, "prompt_embeds_mask": ones[:2]}]
    )
    assert batch["prompt_embeds"].shape == (2, 5, 4)
    assert not batch["prompt_embeds"][1, 2:].any()
    assert batch["prompt_embeds_mask"].tolist() == [[True] * 5, [True] * 2 + [False] * 3]
    with pytest.raises(TrainError, match=r"different lengths \(2 to 5 tokens\) have no mask"):
        batch_prompts([{"prompt_embeds": long}, {"prompt_embeds": short}])


def test_a_mask_that_the_pipeline_leaves_out_is_made(monkeypatch):
    """Qwen-Image returns none for a prompt without padding, and a batch has some."""
    pipe = FAMILIES["qwen_image"]().pipe
    lengths = iter([5, 3])

    def encode_prompt(self, prompt, device=None, prompt_embeds=None, prompt_embeds_mask=None):
        if prompt is None:
            return prompt_embeds, prompt_embeds_mask
        return torch.ones(1, next(lengths), 12), None

    monkeypatch.setattr(type(pipe), "encode_prompt", encode_prompt)
    batch = batch_prompts(encode_prompts(pipe, ["long", "short"]))
    assert batch["prompt_embeds_mask"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_padding_has_no_effect_on_the_prediction():
    family = FAMILIES["qwen_image"]()
    prompts = family.prompts["prompt_embeds"]
    with torch.no_grad():
        padded = predicted(family, family.prompts)
        rows = [
            {"prompt_embeds": prompts[r][:n], "prompt_embeds_mask": torch.ones(n).bool()}
            for r, n in enumerate((5, 3, 5))
        ]
        again = predicted(family, batch_prompts(rows))
    torch.testing.assert_close(padded, again, atol=1e-5, rtol=0)


def test_rows_taken_from_a_batch():
    prompts = {
        "a": torch.arange(3),
        "b": [torch.ones(2), torch.ones(1), torch.zeros(3)],
        "c": (8, 8),
        "prompt": ["x", "y", "z"],
    }
    taken = take_rows(prompts, [2, 0])
    assert taken["a"].tolist() == [2, 0]
    assert [len(b) for b in taken["b"]] == [3, 2]
    assert (taken["c"], taken["prompt"]) == ((8, 8), ["z", "x"])


# ------------------------------------------------------------------------------------- SDXL's sizes


def test_sizes_are_given_to_pipelines_that_ask_for_them():
    assert size_arguments(tiny.tiny_sd1(), (20, 16), (4, 0), (16, 16)) == {}
    assert size_arguments(tiny.tiny_sdxl(), (20, 16), (4, 0), (16, 16)) == {
        "original_size": (20, 16),
        "crops_coords_top_left": (4, 0),
        "target_size": (16, 16),
    }


def test_rows_of_different_sizes_are_predicted_as_alone():
    family = FAMILIES["sdxl"]()
    sizes = [((32, 32), (8, 8)), ((16, 16), (0, 0)), ((32, 32), (8, 8))]
    rows = [
        {name: value[row] for name, value in family.prompts.items()} | size_arguments(family.pipe, *size, (16, 16))
        for row, size in enumerate(sizes)
    ]
    prompts = batch_prompts(rows)
    assert prompts["target_size"] == (16, 16)
    assert row_groups(prompts, 3) == [[0, 2], [1]]
    sizes_alone = [{name: v for name, v in row.items() if isinstance(v, tuple)} for row in rows]
    assert text_prompts(CAPTIONS, sizes_alone) == {
        "prompt": CAPTIONS,
        **{name: v for name, v in prompts.items() if not isinstance(v, torch.Tensor)},
    }
    with torch.no_grad():
        ours = predicted(family, prompts)
        plain = predicted(family, family.prompts)  # the pipeline's own: as large as it is drawn, nothing cropped
        ids = torch.tensor([[32, 32, 8, 8, 16, 16], [16, 16, 0, 0, 16, 16], [32, 32, 8, 8, 16, 16]]).float()
        added = {"text_embeds": family.prompts["pooled_prompt_embeds"], "time_ids": ids}
        t = torch.full((3,), 500)
        theirs = family.pipe.unet(family.latents, t, family.prompts["prompt_embeds"], added_cond_kwargs=added).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], plain[1], atol=1e-5, rtol=0)
    assert not torch.allclose(ours[0], plain[0], atol=1e-4)
