"""Model cards are true, complete as far as things are known, and safe against untrusted metadata.

The page is read by markdown-it (CommonMark with GitHub's tables), the metadata by huggingface_hub.
"""

from __future__ import annotations

import getpass
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import lorakit as lk
from lorakit import formats
from lorakit.adapter.loha import Loha
from lorakit.errors import AdapterError, ConfigError
from lorakit.share import card_of, ours, write
from lorakit.share.markdown import MAX_CHARACTERS, cell, code, line, plain
from lorakit.share.page import _template

EVIL = [
    "a\n---\nlicense: mit\n---\n# owned",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "``` \n# x\n```",
    "`a``b`",
    "{{ 7*7 }}{% x %}",
    "a | b |\n| c",
    "[x](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "https://evil.example www.evil.example",
    "<!-- ",
    "--> x",
    "a\\",
    "\\`|\\",
    "\x1b[31mred\x00\u202e",
    "'\"; import os; os.system('x') #",
    "$(rm -rf ~)",
    "- !!python/object/apply:os.system [x]",
    "*&^%: @x",
    "x" * 10_000,
]


def factors(out=12, rank=4, in_=15, alpha=8.0):
    made = torch.Generator().manual_seed(0)
    return lk.Factors(torch.randn(rank, in_, generator=made), torch.randn(out, rank, generator=made), alpha)


def adapter(base="Qwen/Qwen3-0.6B", task="CAUSAL_LM", module="model.layers.0.q_proj", **metadata):
    config = lk.LoraConfig(rank=4, alpha=8.0, targets=[module.rsplit(".", 1)[-1]], base=base, task=task)
    return lk.Adapter(config, {module: factors()}, metadata=metadata)


def front(text):
    return ModelCard(text).data.to_dict()


def tokens(text):
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(ModelCard(text).text)


def shape(text):
    """Return a page's structure without its words: headings, code blocks, table columns, raw HTML, links, images."""
    found = tokens(text)
    inline = [child for token in found for child in token.children or []]
    return {
        "headings": [t.tag for t in found if t.type == "heading_open"],
        "fences": sum(t.type in ("fence", "code_block") for t in found),
        "columns": [
            len(re.findall("th_open", " ".join(t.type for t in found[i : i + 40])))
            for i, t in enumerate(found)
            if t.type == "thead_open"
        ],
        "html": [t.content for t in (*found, *inline) if t.type.startswith("html")],
        "links": [t.attrGet("href") for t in inline if t.type == "link_open"],
        "images": sum(t.type == "image" for t in inline),
    }


# ------------------------------------------------------------------------------------------ what is on it


def test_the_metadata_has_only_what_is_certain(tmp_path):
    card = card_of(
        adapter().save(tmp_path / "a"), license="apache-2.0", description="Writes verse.", repository="someone/verse"
    )
    assert front(card.text) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
    assert "# verse\n" in card.text
    assert "Writes verse." in card.text
    assert "| rank | 4 |" in card.text
    assert "## Training" not in card.text
    assert "## Results" not in card.text
    assert "## Samples" not in card.text
    bare = card_of(adapter(base=None, task=None).save(tmp_path / "b"))
    assert front(bare.text) == {"library_name": "peft", "tags": ["lora"]}
    options = ("--repository", "--license", "--description", "--base-model", "--data", "lorakit eval", "samples")
    assert all(any(option in line for line in bare.missing) for option in options)


def test_a_dataset_of_the_hub_is_linked_and_its_results_are_in_the_model_index(run_folder):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config | {"data": "someone/rows", "split": "train"}))
    told = front(card_of(run_folder).text)
    assert told["datasets"] == ["someone/rows"]
    assert told["tags"] == ["lora", "lorakit"]
    (result,) = told["model-index"][0]["results"]
    assert result["dataset"] == {"name": "someone/rows", "type": "someone/rows"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("loss", 1.25), ("perplexity", 3.4903)]
    assert all("held out from training" in m["name"] for m in result["metrics"])


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder as `lorakit train` leaves it."""
    run = tmp_path / "home" / "alice" / "runs" / "first"
    metrics = {"steps": 20, "loss": 1.0, "held_out_loss": 1.25}
    recipe = {"model": "Qwen/Qwen3-0.6B", "learning_rate": 0.001}
    data = {"name": "rows.jsonl", "hash": "ab" * 32, "rows": 1234, "template": "chat"}
    adapter(recipe=recipe, metrics=metrics, data=data).save(run / "adapter")
    config = {
        "model": "Qwen/Qwen3-0.6B",
        "data": str(tmp_path / "rows.jsonl"),
        "split": None,
        "learning_rate": "auto",
        "schedule": "cosine",
        "warmup": 0.03,
        "weight_decay": 0.0,
        "seed": 3,
        "out": str(run),
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    steps = [
        {"step": i, "loss": 2.0 - i / 20, "learning_rate": 1e-4 * i, "tokens": 100, "seconds": 9.0 * i}
        for i in range(1, 21)
    ]
    held = [
        {"step": 10, "held_out_loss": 1.25, "held_out_perplexity": 3.4903},
        {"step": 20, "held_out_loss": 1.5, "held_out_perplexity": 4.4817},
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (*steps[:10], held[0], *steps[10:], held[1])) + '{"step": 21, "l'
    )
    (run / "samples").mkdir()
    (run / "samples" / "step-20.json").write_text(
        json.dumps([{"prompt": "Say\nit | so", "base": "no", "tuned": "yes"}])
    )
    return run


def test_a_runs_folder_provides_recipe_data_results_and_samples(run_folder):
    card = card_of(run_folder)
    assert card.path == run_folder / "adapter" / "README.md"
    for row in (
        "| data | `rows.jsonl` |",
        "| rows | 1,234 |",
        f"| SHA-256 of the rows' token ids | `{'ab' * 32}` |",
        "| steps | 20 |",
        "| trained tokens | 2,000 |",
        "| time | 3 minutes |",
        "| schedule | cosine |",
        "| seed | 3 |",
        "| 10 | 1.2500 | 3.49 |",
        "| Say<br>it \\| so | no | yes |",
        "| warmup | 3 % of the steps |",
        "| learning rate | 0.002 |",
    ):
        assert row in card.text, row
    assert "parameters of step 10, where the loss was lowest" in card.text
    assert "weight decay" not in card.text
    assert "model-index" not in front(card.text), "a file of one's own is no dataset of the hub"
    assert sorted(shape(card.text)["html"]) == [f"{card.text.splitlines()[-1]}\n", "<br>"]
    assert card_of(run_folder / "adapter").text == card.text


def test_results_of_lorakit_eval_are_on_the_card_and_for_hub_datasets_in_the_model_index(tmp_path):
    folder = adapter().save(tmp_path / "a")
    rows = [
        {
            "adapter": None,
            "loss": 2.5,
            "perplexity": 12.18,
            "tokens": 900,
            "rows": 50,
            "scores": {"bleu": 5.1, "chrf": 20.0, "rouge_l": 1.0, "exact_match": 0.0},
        },
        {
            "adapter": "adapter",
            "loss": 1.0,
            "perplexity": 2.718,
            "tokens": 900,
            "rows": 50,
            "scores": {"bleu": 61.6, "chrf": 65.8, "rouge_l": 62.4, "exact_match": 3.0},
        },
    ]
    sample = {
        "prompt": "Hi",
        "references": ["x"],
        "texts": [{"adapter": None, "text": "[b]"}, {"adapter": "adapter", "text": "t"}],
    }
    (tmp_path / "eval.json").write_text(json.dumps({"results": rows, "samples": [sample, 3, {"prompt": 1}]}))
    card = card_of(folder, evaluation=tmp_path / "eval.json", evaluated_on="someone/test")
    assert (
        "Greedy answers to prompts of the evaluated rows:\n"
        "\n"
        "| prompt | base | this adapter |\n"
        "|---|---|---|\n"
        "| Hi | \\[b\\] | t |" in card.text
    )
    assert "| base | 2.5000 | 12.18 | 5.1 | 20.0 | 1.0 | 0.0 |" in card.text
    assert "| this adapter | 1.0000 | 2.72 | 61.6 | 65.8 | 62.4 | 3.0 |" in card.text
    (result,) = front(card.text)["model-index"][0]["results"]
    assert result["dataset"]["type"] == "someone/test"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        "loss": 1.0,
        "perplexity": 2.718,
        "bleu": 61.6,
        "chrf": 65.8,
        "rouge_l": 62.4,
        "exact_match": 3.0,
    }
    mine = card_of(folder, evaluation=tmp_path / "eval.json", evaluated_on="test.jsonl")
    assert "50 rows of `test.jsonl` (900 tokens)" in mine.text
    assert "model-index" not in front(mine.text)
    (tmp_path / "eval.json").write_text(json.dumps({"results": [rows[1], rows[1]]}))
    with pytest.raises(ConfigError, match="expected the results of one adapter"):
        card_of(folder, evaluation=tmp_path / "eval.json")


def test_the_code_for_lorakit_and_peft_runs_and_gives_the_same_logits(tiny_llama, tmp_path, monkeypatch):
    import tiny
    import transformers
    from peft import PeftModel

    lk.attach(
        tiny_llama, lk.LoraConfig(rank=4, targets=["q_proj", "down_proj"], task="CAUSAL_LM", base="Qwen/Qwen3-0.6B")
    )
    tiny.randomise_factors(tiny_llama)
    folder = lk.capture(tiny_llama).save(tmp_path / "a")
    expected = tiny.logits(tiny_llama)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny.llama())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: None)
    blocks = [t.content for t in tokens(card_of(folder).text) if t.type == "fence" and t.info == "python"]
    assert len(blocks) == 2
    for block in blocks:
        scope: dict = {}
        exec(block.replace("OWNER/NAME", str(folder)), scope)
        torch.testing.assert_close(tiny.logits(scope["model"]), expected, atol=1e-5, rtol=0)
    assert isinstance(scope["model"], PeftModel)


def image(module="unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", **options):
    header = {
        "ss_tag_frequency": json.dumps({"10_sks dog": {"a dog": 12, "grass": 3}}),
        "ss_base_model_version": "sd_v1",
        "ss_output_name": "my dog",
        "ss_sd_model_name": "/home/alice/models/v1-5.safetensors",
        "modelspec.license": "openrail",
    }
    return lk.Adapter(
        lk.LoraConfig(rank=4, alpha=8.0, targets=["to_q"]),
        {module: factors(320, 4, 320)},
        metadata={"header": header},
        **options,
    )


def test_an_image_adapters_card_has_its_trigger_words_and_diffusers_code(tmp_path):
    file = formats.save(image(), tmp_path / "dog.safetensors", "kohya")
    card = card_of(file, base_model="runwayml/stable-diffusion-v1-5", repository="someone/dog")
    assert card.path == tmp_path / "dog.README.md"
    told = front(card.text)
    assert (told["library_name"], told["pipeline_tag"], told["instance_prompt"]) == (
        "diffusers",
        "text-to-image",
        "sks dog",
    )
    assert "license" not in told, "a licence that the file names is not one that the user gave"
    assert any("the file says 'openrail'" in told for told in card.missing)
    assert "## Trigger words\n\n`sks dog`" in card.text
    assert "`a dog` (12), `grass` (3)" in card.text
    assert 'pipe.load_lora_weights("someone/dog", weight_name="dog.safetensors")' in card.text
    assert 'pipe("sks dog")' in card.text
    assert "alice" not in card.text
    compile(next(t.content for t in tokens(card.text) if t.info == "python"), "card", "exec")


def test_code_that_cannot_work_is_not_shown(tmp_path):
    formats.save(adapter(), tmp_path / "lora.safetensors", "loralib")
    text = card_of(tmp_path / "lora.safetensors", alpha=8.0).text
    assert "lorakit convert OWNER/NAME/lora.safetensors adapter --to peft --alpha 8" in text
    assert "PeftModel" not in text
    file = formats.save(image(embeddings={"<s1>": torch.ones(768)}), tmp_path / "c.safetensors", "cloneofsimo")
    text = card_of(file).text
    assert "load_lora_weights(" not in text
    assert (
        "lorakit convert OWNER/NAME/c.safetensors pytorch_lora_weights.safetensors --to diffusers --allow-loss" in text
    )
    tokens_alone = lk.Adapter(lk.LoraConfig(), {}, embeddings={"<s1>": torch.ones(768)})
    text = card_of(formats.save(tokens_alone, tmp_path / "t.safetensors", "cloneofsimo")).text
    assert "## Use" not in text
    assert "Textual-inversion embeddings: 768 parameters." in text
    text = card_of(adapter(task=None).save(tmp_path / "no-task")).text
    assert "AutoModel" not in text
    formats.save(adapter(), tmp_path / "mlx", "mlx")
    assert "mlx_lm.generate --model Qwen/Qwen3-0.6B" in card_of(tmp_path / "mlx", base_model="Qwen/Qwen3-0.6B").text
    value = image()
    loha = Loha(torch.randn(320, 2), torch.randn(2, 320), torch.randn(320, 2), torch.randn(2, 320), 1.0)
    value = lk.Adapter(value.config, {next(iter(value.factors)): loha})
    file = formats.save(value, tmp_path / "loha.safetensors", "kohya")
    text = card_of(file).text
    assert "load_lora_weights(" not in text
    assert "An adapter (LoHa)" in text
    assert (
        "lorakit resize OWNER/NAME/loha.safetensors pytorch_lora_weights.safetensors --to diffusers --keep 0.99" in text
    )


# ------------------------------------------------------------------------------------------ what must not be on it


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_untrusted_metadata_stays_text(evil, run_folder, tmp_path):
    recipe = {"schedule": evil, "learning_rate": evil, evil[:50]: 1}
    data = {"name": evil, "hash": evil, "rows": evil, "template": evil}
    mark = {"architecture": evil, "shapes": evil, "parameters": evil}
    harmless = "harmless"
    pages = []
    for text in (evil, harmless):
        hostile = adapter(
            base=text,
            task=text,
            recipe=recipe if text == evil else dict.fromkeys(("schedule", "learning_rate"), "x"),
            data=data if text == evil else {"name": "x", "hash": "x"},
            fingerprint=mark if text == evil else {"architecture": "x", "shapes": "x"},
            metrics={"steps": evil},
        )
        hostile = lk.Adapter(hostile.config, hostile.factors, {f"{text[:100]}.weight": torch.ones(2)}, hostile.metadata)
        (tmp_path / text[:3].strip("./<").replace("\n", "").replace("\x00", "")).mkdir(exist_ok=True)
        pages.append(card_of(hostile.save(tmp_path / f"{len(pages)}")).text)
        (run_folder / "samples" / "step-20.json").write_text(
            json.dumps([{"prompt": text, "base": text, "tuned": text}])
        )
        pages.append(card_of(run_folder).text)
    for ours_, theirs in ((pages[0], pages[2]), (pages[1], pages[3])):
        assert front(ours_).keys() == front(theirs).keys()
        a, b = shape(ours_), shape(theirs)
        assert [h for h in a["html"] if h != "<br>"][:-1] == [h for h in b["html"] if h != "<br>"][:-1] == []
        for part in ("headings", "fences", "columns", "links", "images"):
            assert a[part] == b[part], part
        assert "\x1b" not in ours_
        assert "\u202e" not in ours_
        assert len(ours_) < 20_000


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_an_image_files_header_stays_text_on_page_and_in_yaml(evil, tmp_path):
    pages = []
    for text in (evil, "harmless"):
        tags = json.dumps({f"10_{text}": {text: 3}})
        header = {
            "ss_tag_frequency": tags,
            "ss_output_name": text,
            "modelspec.author": text,
            "ss_base_model_version": "sd_v1",
            "ss_training_comment": text,
        }
        value = image()
        value = lk.Adapter(value.config, value.factors, metadata={"header": header})
        pages.append(card_of(formats.save(value, tmp_path / f"{len(pages)}.safetensors", "kohya")).text)
    a, b = map(front, pages)
    assert a.keys() == b.keys()
    assert a["instance_prompt"] == line(evil)
    assert a["tags"] == ["lora", "text-to-image"]
    a, b = map(shape, pages)
    assert a["html"][:-1] == []
    for part in ("headings", "fences", "columns", "links", "images"):
        assert a[part] == b[part], part
    for token in tokens(pages[0]):
        if token.type == "fence" and token.info == "python":
            compile(token.content, "card", "exec")
            assert token.content.count("\n") == 6


def test_no_local_path_or_user_name_is_on_the_card(tmp_path, run_folder):
    base = tmp_path / "llama-local"
    base.mkdir()
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config | {"model": str(base)}))
    value = adapter(
        base=str(base),
        recipe={"model": str(base), "validation": str(tmp_path / "v.jsonl")},
        data={"name": str(tmp_path / "rows.jsonl")},
    )
    value.save(run_folder / "adapter")
    card = card_of(run_folder)
    for secret in (str(tmp_path), "alice", f"/{getpass.getuser()}/"):
        assert secret not in card.text
        assert not any(secret in line_ for line_ in card.missing)
    assert "| base | llama-local |" in card.text
    assert "base_model" not in front(card.text)
    assert '"BASE"' in card.text


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_escaped_text_renders_as_the_original(evil):
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")

    def shown(markdown):
        (inline,) = [t for t in reader.parse(f"| a |\n|---|\n| x{markdown}x |") if t.type == "inline"][1:]
        return "".join(t.content for t in inline.children)

    assert shown(plain(evil)) == f"x{line(evil)}x"
    assert shown(code(evil)) == f"x{line(evil)}x"
    assert not re.search(r"://|www\.", plain(evil)), "GitHub makes links of bare addresses"
    assert len(line(evil)) <= MAX_CHARACTERS
    assert len(cell(evil, 600)) < 2000


def test_the_template_escapes_what_no_filter_names():
    line_ = _template().environment.from_string("{{ x }} {{ none }}").render(x="*a* <b>\n# c", none=None)
    assert line_ == "\\*a\\* \\<b\\> # c "


# ------------------------------------------------------------------------------------------ writing it


def test_only_an_unedited_page_of_ours_is_replaced(tmp_path):
    folder = adapter().save(tmp_path / "a")
    card = card_of(folder)
    write(card.text, card.path)
    assert ours(card.path.read_text())
    write(card_of(folder, license="mit").text, card.path)
    assert "license: mit" in card.path.read_text()
    for theirs in (card.text.replace("## Use", "## How"), "mine", "", card.text + "more"):
        card.path.write_text(theirs)
        with pytest.raises(
            ConfigError, match="was not written by lorakit, or was changed since\n  --force replaces it"
        ):
            write(card.text, card.path)
        assert card.path.read_text() == theirs
    write(card.text, card.path, force=True)
    assert card.path.read_text() == card.text


def test_equal_adapters_have_equal_cards(tmp_path):
    assert card_of(adapter().save(tmp_path / "a")).text == card_of(adapter().save(tmp_path / "b")).text


def test_values_that_the_hub_would_reject_are_refused(tmp_path):
    folder = adapter().save(tmp_path / "a")
    for options, told in (
        ({"license": "Apache 2.0"}, "expected one of the hub's identifiers"),
        ({"base_model": "/home/x"}, "expected a hub id"),
        ({"repository": "alone"}, "expected a hub id"),
        ({"evaluated_on": "x"}, "give both, or neither"),
    ):
        with pytest.raises(ConfigError, match=told):
            card_of(folder, **options)
    with pytest.raises(AdapterError, match="no such file or folder"):
        card_of(tmp_path / "none")


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", "- a"),
        ("samples/step-20.json", "{"),
        ("samples/step-20.json", "[3]"),
        ("metrics.jsonl", "[1]\n3\n"),
    ],
)
def test_a_damaged_run_folder_gives_a_card_or_an_error_that_names_the_file(run_folder, name, content):
    (run_folder / name).write_text(content)
    try:
        card = card_of(run_folder)
    except AdapterError as error:
        assert name in str(error)  # noqa: PT017 (either is right)
    else:
        assert front(card.text)["base_model"] == "Qwen/Qwen3-0.6B"
