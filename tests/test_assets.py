"""The embedded model and data are what the documents say they are."""

from __future__ import annotations

import json

import pytest
import torch

from lorakit.bases.load import EMBEDDED, embedded_folder, load_model, load_tokenizer
from lorakit.bases.load_pipeline import embedded_pipeline, load_pipeline
from lorakit.reproduce.demo import ASSETS
from lorakit.reproduce.emoji.captions import BACKGROUNDS, emoji_list, prompt
from lorakit.reproduce.emoji.judge import load_judge, measure_on_real_pictures
from lorakit.reproduce.slots import check_slots, parse_mr


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / name).read_text(encoding="utf8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED)


def test_the_whole_test_set_is_there_with_every_reference():
    tests = rows("test.jsonl")
    assert len(tests) == len({t["prompt"] for t in tests}) == 630
    assert sum(len(t["references"]) for t in tests) == 4693


def test_no_test_meaning_is_trained_on():
    assert not {t["prompt"] for t in rows("test.jsonl")} & {t["prompt"] for t in rows("train.jsonl")}


def test_training_texts_state_what_their_meaning_says():
    for row in rows("train.jsonl")[::50]:
        found = check_slots(parse_mr(row["prompt"].strip()), row["completion"])
        assert not found.missing
        assert not found.wrong


def test_the_embedded_model_is_a_small_tied_llama(tokenizer):
    model = load_model(EMBEDDED, torch.float32, torch.device("cpu"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 5_868_800
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert (embedded_folder() / "model.safetensors").stat().st_size < 13_000_000


def test_the_embedded_model_prefers_english_to_shuffled_words(tokenizer):
    model = load_model(EMBEDDED, torch.float32, torch.device("cpu"))
    words = [
        "The",
        "little",
        "girl",
        "went",
        "to",
        "the",
        "park",
        "with",
        "her",
        "mother",
        "and",
        "they",
        "played",
        "all",
        "day",
    ]

    def loss(text: str) -> float:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    assert loss(" ".join(words)) + 1 < loss(" ".join(reversed(words)))


def test_the_tokenizer_gives_any_text_back_and_keeps_end_and_pad_apart(tokenizer):
    for text in ("name[Café Adriatic], priceRange[£20-25]\n", "日本語 and emoji 🎉", "  two  spaces\tand a tab\n\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.fixture(scope="module")
def pipe():
    """The embedded image model, as diffusers loads it, from this disk alone."""
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(embedded_pipeline(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_embedded_image_model_is_a_small_pipeline_of_diffusers(pipe):
    size = sum(path.stat().st_size for path in embedded_pipeline().rglob("*") if path.is_file())
    assert size < 10e6
    parts = {"unet": 1_810_000, "text_encoder": 310_000, "vae": 430_000}  # parameters
    for name, most in parts.items():
        assert most * 0.9 < sum(p.numel() for p in getattr(pipe, name).parameters()) < most
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    ours = load_pipeline(EMBEDDED, torch.float32, torch.device("cpu"))
    assert torch.equal(ours.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_the_embedded_image_model_draws_what_the_prompt_says(pipe):
    judge = load_judge(embedded_pipeline() / "judge")
    asked = [(thing, scene) for thing in ("panda", "strawberry", "pizza", "owl") for scene in ("meadow", "night")]
    drawn = pipe(
        [prompt(*pair) for pair in asked],
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(number) for number in range(len(asked))],
        output_type="pt",
    ).images
    with torch.no_grad():
        things, backgrounds = (logits.argmax(1).tolist() for logits in judge(2 * drawn - 1))
    words, scenes = [emoji.word for emoji in emoji_list()], list(BACKGROUNDS)
    assert sum((words[n], scenes[m]) == pair for n, m, pair in zip(things, backgrounds, asked, strict=True)) >= 6


def test_the_judge_knows_real_pictures():
    shares = measure_on_real_pictures(load_judge(embedded_pipeline() / "judge"), count=128)
    assert shares["object"] >= 0.95
    assert shares["background"] >= 0.97


def test_the_image_models_card_has_the_figures_that_were_measured():
    folder = embedded_pipeline()
    measures = json.loads((folder / "evaluation.json").read_text(encoding="utf8"))
    card = (folder / "README.md").read_text(encoding="utf8")
    for row in ("seen pairs", "pairs never seen", "real pictures"):
        assert f"| {row} | {measures[row]['object']:.1%} | {measures[row]['background']:.1%} |" in card
    assert "license: cc-by-4.0" in card


def test_others_data_and_weights_are_named_in_the_notice():
    notice = (embedded_folder().parents[2] / "NOTICE").read_text(encoding="utf8")
    for path in (
        "lorakit/assets/e2e/",
        "lorakit/assets/tiny-lm/",
        "lorakit/assets/twemoji/",
        "lorakit/assets/tiny-diffusion/",
        "tests/fixtures/peft_0.6.1/",
        "tests/fixtures/loralib_roberta_mnli/",
    ):
        assert path in notice
