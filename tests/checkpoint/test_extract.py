"""A LoRA out of two checkpoints: what was merged in comes out again, and base plus adapter computes what the tuned
model does.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import logits

import lorakit as lk
from lorakit.checkpoint import merge_checkpoint
from lorakit.checkpoint.extract import extract
from lorakit.errors import ConfigError, LorakitError, TargetError


def save(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def tuned(make, size: float = 0.02, seed: int = 3, only=lambda name: True):
    """The model with a full-rank change of its parameters."""
    model = make()
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = torch.randn(parameter.shape, generator=made) * size
            if only(name):
                parameter.add_(change)
    return model


def double(f: lk.Factors) -> torch.Tensor:
    return lk.Factors(**{**f.__dict__, "A": f.A.double(), "B": f.B.double()}).delta()


MODELS = {
    "llama": (tiny.llama, {"targets": "all-linear"}, {}),
    "llama sharded": (tiny.llama, {"targets": "all-linear", "rslora": True}, {"max_shard_size": "6KB"}),
    "llama head and embedding": (tiny.llama, {"targets": ["lm_head", "embed_tokens", "q_proj"]}, {}),
    "gpt2": (tiny.gpt2, {"targets": "all-linear"}, {}),
    "gpt2 packed": (tiny.gpt2, {"targets": ["c_attn", "wpe"], "packed": {"c_attn": [True, False, True]}}, {}),
    "bert": (tiny.bert, {"targets": ["query", "value"]}, {}),
    "t5": (tiny.t5, {"targets": ["q", "wo"]}, {}),
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_what_was_merged_in_comes_out_again(tmp_path, kind):
    make, config, shards = MODELS[kind]
    base = save(make(), tmp_path / "base", **shards)
    model = lk.attach(make(), lk.LoraConfig(rank=3, alpha=6, **config))
    before = lk.capture(tiny.randomise_factors(model))
    merge_checkpoint(base, before, tmp_path / "tuned")
    done = extract(base, tmp_path / "tuned", keep=0.999999)
    assert set(done.adapter.factors) == set(before.factors)
    for m, f in before.factors.items():
        W, found = double(f), done.adapter.factors[m]
        assert found.kind == f.kind
        assert found.rank <= (3 if not f.parts else 6)
        torch.testing.assert_close(double(found), W, atol=2e-5 * float(W.abs().max()) + 1e-6, rtol=1e-3)
    assert done.captured > 0.99999
    assert not done.rest
    torch.testing.assert_close(logits(lk.attach(make(), done.adapter)), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert], ids=["llama", "gpt2", "bert"])
def test_base_and_adapter_with_the_rest_compute_what_the_tuned_model_does(tmp_path, make):
    model = tuned(make)
    base, new = save(make(), tmp_path / "base"), save(model, tmp_path / "tuned", max_shard_size="8KB")
    done = extract(base, new, keep=1.0, save_rest=True)
    assert done.captured > 0.999999
    assert done.rest
    assert set(done.rest) == set(done.adapter.saved)
    again = lk.Adapter.load(done.adapter.save(tmp_path / "adapter"))
    torch.testing.assert_close(logits(lk.attach(make(), again)), logits(model), atol=2e-5, rtol=0)


def test_peft_loads_what_was_extracted(tmp_path):
    model = tuned(tiny.llama, only=lambda n: n.endswith("_proj.weight"))
    base, new = save(tiny.llama(), tmp_path / "base"), save(model, tmp_path / "tuned")
    extract(base, new, keep=1.0).adapter.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-5, rtol=0)


def test_a_given_rank_is_the_best_of_that_rank_and_the_report_is_true(tmp_path):
    model = tuned(tiny.llama)
    base, new = save(tiny.llama(), tmp_path / "base"), save(model, tmp_path / "tuned")
    done = extract(base, new, rank=4)
    before, after = (load_file(f / "model.safetensors") for f in (base, new))
    left, whole = 0.0, sum(float((after[n].double() - before[n].double()).square().sum()) for n in before)
    for report in done.modules:
        W = after[f"{report.module}.weight"].double() - before[f"{report.module}.weight"].double()
        best = float(torch.linalg.svdvals(W)[4:].norm())
        true = float((W - double(done.adapter.factors[report.module])).norm())
        assert true == pytest.approx(best, rel=1e-4)
        assert report.error == pytest.approx(true / float(W.norm()), rel=1e-4)
        assert report.change == pytest.approx(
            float(W.norm() / before[f"{report.module}.weight"].double().norm()), rel=1e-4
        )
        assert report.rank == 4
        left += true**2
    norms = sum(float((after[n].double() - before[n].double()).square().sum()) for n in done.rest)
    assert set(done.rest) == {n for n in before if "norm" in n}
    assert done.captured == pytest.approx(1 - (left + norms) / whole, abs=1e-5)
    assert not done.adapter.saved
    assert done.to_dict()["captured"] == done.captured


def test_a_tied_head_changes_with_its_embedding(tmp_path, tied_llama):
    model = tuned(lambda: tiny.llama(tied=True), only=lambda n: "embed" in n)
    base, new = save(tied_llama, tmp_path / "base"), save(model, tmp_path / "tuned")
    done = extract(base, new, keep=1.0)
    assert set(done.adapter.factors) == {"model.embed_tokens", "lm_head"}
    torch.testing.assert_close(logits(lk.attach(tiny.llama(tied=True), done.adapter)), logits(model), atol=2e-5, rtol=0)


def test_unchanged_modules_are_skipped_and_targets_chosen(tmp_path):
    model = tuned(tiny.llama, only=lambda n: "layers.1" in n and "proj" in n)
    base, new = save(tiny.llama(), tmp_path / "base"), save(model, tmp_path / "tuned")
    done = extract(base, new, rank=2)
    assert all(".1." in m for m in done.adapter.factors)
    assert len(done.adapter.factors) == 7
    assert done.unchanged == len(load_file(base / "model.safetensors")) - 7
    some = extract(base, new, rank=2, targets=["q_proj", "v_proj"])
    assert set(some.adapter.factors) == {f"model.layers.1.self_attn.{n}_proj" for n in "qv"}
    assert len(some.rest) == 5
    with pytest.raises(TargetError, match=r"no weight of the targets \['x'\] changed, but these did: model"):
        extract(base, new, rank=2, targets=["x"])


def test_the_extracted_adapter_knows_its_base(tmp_path):
    base = save(tiny.llama(), tmp_path / "base")
    adapter = extract(base, save(tuned(tiny.llama), tmp_path / "tuned"), rank=2).adapter
    assert (
        adapter.metadata["fingerprint"] == lk.capture(lk.attach(tiny.llama(), lk.LoraConfig())).metadata["fingerprint"]
    )
    with pytest.raises(LorakitError, match="trained on another base"):
        lk.attach(tuned(tiny.llama, size=1.0), adapter)


def test_files_without_the_beginning_of_the_models_names(tmp_path):
    base, new = save(tiny.gpt2(), tmp_path / "base"), save(tuned(tiny.gpt2), tmp_path / "tuned")
    for folder in (base, new):
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {n.removeprefix("transformer."): t for n, t in tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    done = extract(base, new, keep=1.0, save_rest=True)
    assert "transformer.h.0.attn.c_attn" in done.adapter.factors
    torch.testing.assert_close(
        logits(lk.attach(tiny.gpt2(), done.adapter)), logits(tuned(tiny.gpt2)), atol=2e-5, rtol=0
    )


def test_an_architecture_that_transformers_does_not_know_goes_by_the_files_names(tmp_path):
    base, new = save(tiny.llama(), tmp_path / "base"), save(tuned(tiny.llama), tmp_path / "tuned")
    for folder in (base, new):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Own"], "model_type": "own"}))
    done = extract(base, new, keep=1.0)
    assert done.adapter.factors["model.embed_tokens"].kind == "embedding"
    assert "fingerprint" not in done.adapter.metadata
    assert done.captured > 0.98


def test_half_precision_counts_only_what_the_files_hold(tmp_path):
    model = tuned(tiny.llama, size=0.1)
    base, new = save(tiny.llama().bfloat16(), tmp_path / "base"), save(model.bfloat16(), tmp_path / "tuned")
    done = extract(base, new, keep=1.0, save_rest=True)
    a, b = (load_file(f / "model.safetensors") for f in (base, new))
    for m, f in done.adapter.factors.items():
        torch.testing.assert_close(
            double(f), b[f"{m}.weight"].double() - a[f"{m}.weight"].double(), atol=1e-6, rtol=1e-5
        )
    assert {t.dtype for t in done.adapter.saved.values()} == {torch.bfloat16}


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "edit, said",
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"hold different tensors, 1 in all: 'model\.norm\.weight' is only in .*base",
        ),
        (lambda t: t.update(extra=torch.ones(2)), "'extra' is only in .*tuned"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(50, 16)}),
            r"'lm_head\.weight' has shape \[48, 16\] in .*base and \[50, 16\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.full((48, 16), float("nan"))}),
            r"'lm_head\.weight' holds values that are not finite",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(48, 16, dtype=torch.int8)}),
            r"'lm_head\.weight' is stored as F32 and as I8",
        ),
        (lambda t: None, "nothing differs between"),
    ],
)
def test_checkpoints_that_do_not_belong_together_are_refused_by_name(tmp_path, edit, said):
    base, new = save(tiny.llama(), tmp_path / "base"), save(tiny.llama(), tmp_path / "tuned")
    change(new, edit)
    with pytest.raises(LorakitError, match=said):
        extract(base, new, rank=2)


def test_only_a_norm_changed_needs_save_rest(tmp_path):
    base, new = (
        save(tiny.llama(), tmp_path / "base"),
        save(tuned(tiny.llama, only=lambda n: n == "model.norm.weight"), tmp_path / "tuned"),
    )
    with pytest.raises(TargetError, match=r"no weight of a matrix changed, but these did: model\.norm\.weight"):
        extract(base, new, rank=2)
    assert set(extract(base, new, rank=2, save_rest=True).adapter.saved) == {"model.norm.weight"}


def test_a_rank_or_a_share_must_be_said(tmp_path):
    for options in ({}, {"rank": 0}, {"keep": 1.2}):
        with pytest.raises(ConfigError, match="extract needs a rank"):
            extract(tmp_path, tmp_path, **options)


def test_a_head_that_only_the_tuned_model_has_of_its_own_is_its_own_change(tmp_path):
    base = save(tiny.llama(tied=True), tmp_path / "base")
    model = tiny.llama(tied=True)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.02 * torch.randn(model.lm_head.weight.shape))
    save(model, tmp_path / "tuned")
    done = extract(base, tmp_path / "tuned", keep=1.0)
    assert list(done.adapter.factors) == ["lm_head"]
    merge_checkpoint(base, done.adapter, tmp_path / "out", untie=True)
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"],
        model.lm_head.weight.detach(),
        atol=1e-6,
        rtol=0,
    )


def test_doubts_are_said(tmp_path):
    base = save(tiny.llama(), tmp_path / "base")
    save(tiny.llama(dtype=torch.bfloat16), tmp_path / "rounded")
    torch.manual_seed(3)
    other = tiny.llama()
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    save(other, tmp_path / "other")
    assert any("does not seem to be fine-tuned" in w for w in extract(base, tmp_path / "other", 2).warnings)
    assert any("stored as F32 and as BF16" in w for w in extract(base, tmp_path / "rounded", 2).warnings)
    assert not extract(base, save(tuned(tiny.llama), tmp_path / "tuned"), 2).warnings


@pytest.mark.parametrize("make", [lambda: tiny.llama(tied=True), tiny.gpt2], ids=["llama", "gpt2"])
def test_the_change_of_tied_weights_merges_back_as_one(make, tmp_path):
    base = save(make(), tmp_path / "base")
    after = tuned(make)
    done = extract(base, save(after, tmp_path / "tuned"), keep=1.0, save_rest=True)
    merge_checkpoint(base, done.adapter, tmp_path / "out")
    torch.testing.assert_close(
        logits(type(after).from_pretrained(tmp_path / "out").eval()), logits(after.eval()), atol=2e-4, rtol=1e-3
    )
