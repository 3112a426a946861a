"""Logits through a base: with the adapter attached, against the base with the file's content added."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import peft
import pytest
import tiny
import tiny_lm
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapter.dora import Dora
from lorakit.bases.load import embedded_folder
from lorakit.errors import AdapterError
from lorakit.export import export
from lorakit.export.logits import TOLERANCE, apply
from lorakit.export.written import read
from lorakit.formats import gguf as gguf_format

STAGING = sys.modules["lorakit.export.staging"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny models, by name."""
    folder = tmp_path_factory.mktemp("bases")
    models = {
        "llama": tiny_lm.llama(),
        "tied": tiny_lm.llama(tied=True),
        "gpt2": tiny_lm.gpt2(),
        "t5": tiny.t5(),
        "bert": tiny.bert(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return folder


MODELS = {
    "llama": tiny_lm.llama,
    "tied": lambda: tiny_lm.llama(tied=True),
    "gpt2": tiny_lm.gpt2,
    "t5": tiny.t5,
    "bert": tiny.bert,
}


def trained(name: str, **config) -> lk.Adapter:
    """A randomly initialized adapter of that base."""
    model = lk.attach(MODELS[name](), lk.LoraConfig(**{"rank": 4, "alpha": 8, "targets": "all-linear"} | config))
    return lk.capture(tiny.randomise_factors(model))


def with_doras(adapter: lk.Adapter) -> lk.Adapter:
    made = torch.Generator().manual_seed(3)
    return replace(
        adapter,
        updates={m: Dora(f, torch.rand(f.B.shape[0], 1, generator=made) + 0.5) for m, f in adapter.factors.items()},
    )


RECEIVERS = ["peft", "vllm", "sglang", "canonical", "mlx", "llama.cpp", "ollama"]


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("receiver", RECEIVERS)
def test_each_receivers_file_gives_the_same_logits_as_the_adapter(tmp_path, bases, receiver, base):
    other = "q_proj" if base == "llama" else "c_proj"
    patterns = {"rank_pattern": {other: 2}, "alpha_pattern": {other: 3}}
    name = "x.gguf" if receiver in ("llama.cpp", "ollama") else "out"
    done = export(
        trained(base, **patterns), tmp_path / name, receiver, fix=True, verify=True, base=bases / base, model="m"
    )
    assert done.no_logits is None
    assert done.logits.live
    assert done.logits.relative < 2e-5  # float32's rounding, through layers that the random adapter turns upside down
    assert done.logits.moved > 0.1 * done.logits.largest, "an adapter that does nothing would prove nothing"


@pytest.mark.parametrize(
    "config",
    [
        {"targets": ["q_proj", "embed_tokens"], "save_modules": ["lm_head"]},
        {"targets": ["q_proj"], "save_modules": ["norm", "embed_tokens"]},
    ],
)
@pytest.mark.parametrize("base", ["llama", "tied"])
def test_saved_weights_and_embeddings_tied_or_not(tmp_path, bases, base, config):
    done = export(trained(base, **config), tmp_path / "out", "peft", verify=True, base=bases / base)
    assert done.logits.relative < 2e-6
    assert done.logits.moved > 0.1


def test_logits_of_an_encoder_decoder_model(tmp_path, bases):
    done = export(trained("t5", targets=["q", "wo"]), tmp_path / "out", "peft", verify=True, base=bases / "t5")
    assert done.logits.relative < 2e-6


def test_logits_of_the_embedded_model(tmp_path):
    from lorakit.bases.load import load_model

    model = lk.attach(
        load_model("embedded", torch.float32, torch.device("cpu")),
        lk.LoraConfig(rank=4, targets=["q_proj", "down_proj"]),
    )
    value = lk.capture(tiny.randomise_factors(model, size=0.05)).to(torch.bfloat16)
    done = export(value, tmp_path / "x.gguf", "llama.cpp", verify=True, base=embedded_folder())
    assert done.logits.relative < 1e-5
    assert done.logits.moved > 0.1


DAMAGE = {
    "llama.cpp": ("x.gguf", lambda adapter: adapter * 1.1),
    "peft": ("out", lambda adapter: replace(adapter, saved={n: t * 1.5 for n, t in adapter.saved.items()})),
}


@pytest.mark.parametrize("receiver", DAMAGE)
def test_different_logits_are_an_error_and_nothing_is_written(tmp_path, bases, monkeypatch, receiver):
    """With the element-wise comparison disabled, the logits alone reveal the damage."""
    name, damaged = DAMAGE[receiver]
    value = trained("llama", save_modules=["lm_head"] if receiver == "peft" else [])
    written = STAGING.save
    monkeypatch.setattr(sys.modules["lorakit.export.verify"], "differences", lambda *_: {})
    monkeypatch.setattr(STAGING, "save", lambda adapter, *args, **options: written(damaged(adapter), *args, **options))
    with pytest.raises(AdapterError, match=r"gives different logits through .*llama: off by \S+, \S+ of the largest"):
        export(value, tmp_path / name, receiver, verify=True, base=bases / "llama")
    assert list(tmp_path.iterdir()) == []


def test_unpermuted_gguf_rows_are_detected(tmp_path, bases, monkeypatch):
    monkeypatch.setattr(gguf_format, "permute", lambda B, *_: B)
    value = trained("llama", targets=["q_proj"])
    with pytest.raises(AdapterError, match="ΔW by"):
        export(value, tmp_path / "x.gguf", "llama.cpp", verify=True, base=bases / "llama")
    monkeypatch.setattr(sys.modules["lorakit.export.verify"], "differences", lambda *_: {})
    with pytest.raises(AdapterError, match="gives different logits"):
        export(value, tmp_path / "x.gguf", "llama.cpp", verify=True, base=bases / "llama")


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("receiver", ["peft", "mlx"])
def test_a_dora_is_compared_with_the_live_model(tmp_path, bases, base, receiver):
    value = with_doras(trained(base, targets=["q_proj", "down_proj"] if base == "llama" else ["c_attn", "c_proj"]))
    done = export(value, tmp_path / "out", receiver, verify=True, base=bases / base)
    assert done.logits.live
    assert done.logits.relative < 3e-6
    assert done.logits.moved > 0.1


@pytest.mark.parametrize("base, embedding", [("llama", "embed_tokens"), ("gpt2", "wte")])
def test_an_embeddings_dora_in_mlx(tmp_path, bases, base, embedding):
    """One magnitude per token, with the norm of the token's row."""
    made = torch.Generator().manual_seed(4)
    value = trained(base, targets=[embedding])
    value = replace(
        value, updates={m: Dora(f, torch.rand(1, f.A.shape[1], generator=made) + 0.5) for m, f in value.factors.items()}
    )
    done = export(value, tmp_path / "out", "mlx", verify=True, base=bases / base)
    assert done.logits.relative < 2e-6
    assert done.logits.moved > 0.1
    # MLX's computation: the stored rows, scaled to the norms in the file.
    there = load_file(tmp_path / "out" / "adapters.safetensors")
    module, f = next(iter(value.factors.items()))
    plain = MODELS[base]().eval()
    V = plain.get_submodule(module).weight.detach() + f.delta()
    wanted = V * (there[f"{module}.m"] / V.norm(dim=1))[:, None]
    apply(plain, read(tmp_path / "out", "mlx"))
    torch.testing.assert_close(plain.get_submodule(module).weight, wanted, rtol=1e-5, atol=1e-6)


def test_a_zero_row_stays_zero_under_dora():
    from lorakit.export.effect import Content, Effect

    model = MODELS["llama"]()
    name = "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[3] = 0
    apply(model, Content({name: Effect(magnitude=torch.full((32, 1), 2.0).numpy())}))
    lengths = model.get_submodule(name).weight.norm(dim=1)
    assert lengths[3] == 0
    torch.testing.assert_close(lengths[4:], torch.full((28,), 2.0))


@pytest.mark.parametrize(
    "base, targets, more",
    [
        ("llama", ["q_proj", "embed_tokens"], {"use_dora": True, "modules_to_save": ["lm_head"]}),
        ("gpt2", ["c_attn", "wte"], {"use_dora": True, "fan_in_fan_out": True}),
        (
            "llama",
            ["q_proj", "k_proj"],
            {"use_rslora": True, "rank_pattern": {"layers.1.*": 2}, "alpha_pattern": {".*q_proj": 3, "q_proj": 9}},
        ),
    ],
)
def test_the_independent_reader_agrees_with_peft(tmp_path, bases, base, targets, more):
    """PEFT's own file, read by the verifying code and added to plain weights, gives PEFT's logits."""
    theirs = peft.get_peft_model(MODELS[base](), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **more))
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=made) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ids = torch.tensor([[3, 7, 200, 5]])
    plain = MODELS[base]().eval()
    before = plain(ids).logits
    apply(plain, read(tmp_path / "theirs", "peft"))
    expected = theirs.eval()(ids).logits
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 0.1


def test_a_base_with_only_a_config_is_enough_for_gguf_names(tmp_path, bases):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((bases / "llama" / "config.json").read_bytes())
    done = export(trained("llama"), tmp_path / "x.gguf", "llama.cpp", verify=True, base=tmp_path / "base")
    assert done.difference < 1e-6
    assert done.logits is None
    assert "has a config but no weights" in done.no_logits


def test_the_command_prints_what_was_compared(tmp_path, bases, capsys):
    from lorakit.cli import run

    trained("llama").save(tmp_path / "a")
    with_doras(trained("llama")).save(tmp_path / "dora")

    def printed(source: str, *more: str) -> list[str]:
        assert (
            run(
                ["export", str(tmp_path / source), str(tmp_path / "out"), "--for", "peft", "--verify", "--force", *more]
            )
            == 0
        )
        return capsys.readouterr().out.splitlines()[1:-1]

    differences, logits = printed("a", "--base", str(bases / "llama"))
    assert differences == "read back: ΔW off by at most 0 of the largest element"
    assert logits.startswith(f"logits through {bases / 'llama'}: the largest difference is ")
    assert "of the largest logit (the adapter moves them by up to " in logits
    *compared, unchecked = printed("dora")[1:]
    assert compared == [
        "read back: DoRA's magnitudes off by at most 0 of the largest element",
        "logits not compared: no base was given (--base FOLDER)",
    ]
    assert unchecked.startswith("not checked: without a base (--base) it was not checked that the model has the ")
    assert (
        run(["export", str(tmp_path / "a"), str(tmp_path / "out"), "--for", "peft", "--verify", "--force", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["difference"], report["logits"]) == (0, None)
    assert "no base" in report["no_logits"]


def test_a_pickled_base_works(tmp_path, bases):
    model = MODELS["llama"]()
    model.config.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    assert (
        export(trained("llama"), tmp_path / "out", "peft", verify=True, base=tmp_path / "base").logits.relative < 2e-5
    )


def test_the_reason_for_not_comparing_logits_is_reported(tmp_path, bases, monkeypatch):
    value = trained("llama")

    def reason(base, value=value, **more) -> str:
        return export(value, tmp_path / "out", "peft", verify=True, base=base, **more).no_logits

    assert "no base was given" in reason(None)
    assert "org/name is not a folder" in reason("org/name")
    assert "the base is not a folder" in reason({"model_type": "llama"})
    assert "has no config.json" in reason(tmp_path)
    assert "SEQ_CLS" in reason(bases / "llama", replace(value, config=value.config.replace(task="SEQ_CLS")))
    monkeypatch.setattr(sys.modules["lorakit.export.logits"], "_free_memory", lambda: 1000)
    assert "of memory are free" in reason(bases / "llama")
    config = json.loads((bases / "llama" / "config.json").read_text())
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    save_file(load_file(bases / "llama" / "model.safetensors"), tmp_path / "quantized" / "model.safetensors")
    assert "is quantized" in reason(tmp_path / "quantized")
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantized" / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x0f{}")
    assert "is not a sound safetensors file" in reason(tmp_path / "quantized")
    header = json.dumps({"x": {"dtype": "F32", "shape": "huge", "data_offsets": [0, 4]}}).encode()
    (tmp_path / "quantized" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "is not a sound safetensors file" in reason(tmp_path / "quantized")
    (tmp_path / "quantized" / "config.json").write_text("{}")
    assert "cannot be read" in reason(tmp_path / "quantized")
    assert export(value, tmp_path / "out", "peft", base=bases / "llama").no_logits is None, (
        "verification was not requested"
    )


def test_a_base_that_is_no_language_model_is_reported(tmp_path, bases):
    value = trained("bert", targets=["query"])
    done = export(value, tmp_path / "out", "peft", verify=True, base=bases / "bert")
    assert "cannot load" in done.no_logits or "lacks weights" in done.no_logits


def test_a_model_that_needs_more_than_token_ids_is_reported(tmp_path, bases, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids, pixel_values: None)
    done = export(trained("gpt2"), tmp_path / "out", "peft", verify=True, base=bases / "llama")
    assert "gives no logits for token ids alone" in done.no_logits
    assert "pixel_values" in done.no_logits or "use_cache" in done.no_logits


def test_image_models_are_not_compared_through_a_base(tmp_path, bases):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    value = lk.Adapter(
        lk.LoraConfig(rank=2, targets=["to_q"]), {name: lk.Factors(torch.randn(2, 320), torch.randn(320, 2), 2.0)}
    )
    done = export(value, tmp_path / "out", "diffusers", verify=True, base=bases / "llama")
    assert "image models" in done.no_logits


@pytest.mark.parametrize("dora", [False, True])
def test_a_wrong_base_is_an_error_and_nothing_is_written(tmp_path, bases, dora):
    value = trained("llama")
    value = with_doras(value) if dora else value
    with pytest.raises(
        AdapterError, match=r"cannot be compared through this base(.|\n)*give the adapter's own base, or none"
    ):
        export(value, tmp_path / "out", "peft", verify=True, base=bases / "gpt2")
    tiny_lm.llama(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="trained on another base"):
        export(value, tmp_path / "out", "peft", verify=True, base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_content_that_does_not_fit_the_model_is_an_error(bases):
    from lorakit.export.effect import Content, Effect

    model = MODELS["llama"]()
    name = "model.layers.0.self_attn.q_proj"
    for content, said in (
        (Content({name: Effect(lambda: torch.zeros(3, 4).numpy())}), r"has a ΔW of \[3, 4\]"),
        (Content({"model.layers.9": Effect()}), "is not a module"),
        (Content({"model.layers.0": Effect()}), "has no weight"),
        (Content({name: Effect(magnitude=torch.ones(5).numpy())}), "has a magnitude"),
        (Content({}, {"lm_head.weight": torch.ones(2, 2).numpy()}), "'lm_head.weight' is"),
        (Content({}, {"lm_head.bias": torch.ones(2).numpy()}), "missing"),
    ):
        with pytest.raises(AdapterError, match=said):
            apply(model, content)


def test_the_tolerance_exceeds_float32_rounding():
    assert 1e-5 < TOLERANCE <= 1e-3
