"""`lorakit compare`, and the heat maps and base comparison of `lorakit inspect`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import tiny
import tiny_lm
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.adapter.lora import Factors
from lorakit.analysis.compare import compare
from lorakit.analysis.compare_report import write_html


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """Folders of two adapters of the model; the second has one module fewer."""
    folder = tmp_path_factory.mktemp("two")
    for seed, name in ((1, "a"), (2, "b")):
        live = lk.attach(
            tiny_lm.llama(), lk.LoraConfig(rank=2 + seed, alpha=4, targets=["q_proj", "down_proj"], base=model)
        )
        made = lk.capture(tiny.randomise_factors(live, seed))
        if name == "b":
            made = replace(made, updates={m: f for m, f in made.factors.items() if m != "model.layers.0.mlp.down_proj"})
        made.save(folder / name)
    return folder / "a", folder / "b"


def test_compare_reports_similarity_and_interference(lorakit, two):
    code, out, error = lorakit("compare", *two, "--module", "layers.1.self_attn.q_proj")
    assert code == 0, error
    assert "3 modules in both, 1 in A alone, 0 in B alone" in out
    assert "only in A: model.layers.0.mlp.down_proj" in out
    assert re.search(r"with both active, B changes A's effect by [\d.]+ %", out)
    assert "φ(A, B, i, j), model.layers.1.self_attn.q_proj, right singular directions of A" in out
    module = "--module layers.1.self_attn.q_proj"
    assert out.splitlines()[-1] == f"next: lorakit compare {two[0]} {two[1]} {module} --html report.html"
    code, out, _ = lorakit("compare", *two, "--modules")
    assert "model.layers.1.mlp.down_proj" in out


def test_compare_as_json_has_every_figure(lorakit, two, model):
    code, out, error = lorakit("compare", *two, "--json", "--base", model, "--of", "left", "--module", "q_proj")
    assert code == 0, error
    told = json.loads(out)
    assert [p["ranks"] for p in told["pairs"]] == [[3, 4]] * 3
    assert all(len(p["angles_in"]) == 3 for p in told["pairs"])
    assert [s["of"] for s in told["similarities"]] == ["left", "left"]
    assert [len(side) for side in told["amplifications"]] == [2, 2]
    one = told["amplifications"][0][0]
    assert one["factor"] == pytest.approx(one["norm_delta"] / one["in_delta"])
    same = json.loads(lorakit("compare", two[0], two[0], "--json")[1])["pairs"][0]
    assert same["a_by_b"]["gain"] == pytest.approx(1)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_self_contained_page(lorakit, two, model, tmp_path):
    code, out, error = lorakit(
        "compare", *two, "--base", model, "--html", tmp_path / "r.html", "--plot", tmp_path / "p.svg"
    )
    assert code == 0, error
    assert f"written: {tmp_path / 'r.html'}" in out
    assert "<svg" in (tmp_path / "p.svg").read_text()[:1000]
    text = (tmp_path / "r.html").read_text(encoding="utf8")
    page = Page()
    page.feed(text)
    sources = [a[k] for _, a in page.tags for k in ("src", "href", "action") if k in a]
    assert sources
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "url(" not in text
    for name in ("model.layers.1.mlp.down_proj", "Only in A", "amplification", "in random", "φ(A, B, i, j)"):
        assert name in page.text


def test_names_from_a_file_are_escaped_in_the_report(lorakit, tmp_path):
    evil = "<script>alert(1)</script>\x1b"
    made = lk.Adapter(
        lk.LoraConfig(rank=1, alpha=1, targets=["x"]),
        {f"layers.0.{evil}": Factors(torch.ones(1, 3), torch.ones(2, 1), 1.0)},
    )
    text = write_html(compare(made, made, (evil, "$b")), tmp_path / "r.html").read_text(encoding="utf8")
    assert "<script" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;" in text


def test_an_unsupported_plot_ending_is_refused_before_any_work(lorakit, two, tmp_path):
    for verb in (["compare", *two], ["inspect", two[0]]):
        code, _, error = lorakit(*verb, "--plot", tmp_path / "p.pdf")
        assert code == 2
        assert ".png or .svg" in error


def test_inspect_draws_a_heat_map_and_compares_with_the_base(lorakit, two, model, tmp_path):
    code, out, error = lorakit("inspect", two[0], "--base", model, "--map", "--plot", tmp_path / "m.png")
    assert code == 0, error
    assert "‖ΔW‖ / ‖W‖" in out
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(lorakit("inspect", two[0], "--base", model, "--json")[1])
    weights = load_file(f"{model}/model.safetensors")
    adapter = lk.Adapter.load(two[0])
    for m in told["modules"]:
        expected = adapter.factors[m["name"]].delta().norm() / weights[m["name"] + ".weight"].norm()
        assert m["relative"] == pytest.approx(float(expected), rel=1e-5)
    code, _, error = lorakit("inspect", two[0], "--quantity", "relative")
    assert (code, "--base FOLDER" in error) == (2, True)
    assert lorakit("inspect", model, "--map")[0] == 2


def test_inspect_and_compare_list_the_keys_with_nan(lorakit, two, tmp_path):
    tensors = load_file(two[0] / "adapter_model.safetensors")
    bad = sorted(tensors)[1::3]
    for key in bad:
        tensors[key].view(-1)[:2] = float("nan")
    folder = tmp_path / "bad"
    lk.Adapter.load(two[0]).save(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    for verb in (["inspect", folder], ["compare", two[0], folder]):
        code, _, error = lorakit(*verb)
        assert code == 1
        for key in bad:
            assert f"{key}: 2" in error
        assert f"{len(bad)} keys" in error


def test_comparing_or_combining_unrelated_adapters_is_an_error(lorakit, two, tmp_path):
    f = Factors(torch.randn(2, 4), torch.randn(4, 2), 2.0)
    lk.Adapter(lk.LoraConfig(rank=2, alpha=2, targets=["to_q"]), {"unet.down_blocks.0.to_q": f}).save(tmp_path / "unet")
    code, out, error = lorakit("compare", two[0], tmp_path / "unet")
    assert (code, out) == (1, "")
    assert "model.layers.0" in error
    assert "unet.down_blocks.0.to_q" in error
    code, _, error = lorakit("combine", two[0], tmp_path / "unet", "--out", tmp_path / "mix")
    assert code == 1
    assert "--force-base if you know better" in error
    assert not (tmp_path / "mix").exists()
    assert lorakit("combine", two[0], tmp_path / "unet", "--out", tmp_path / "mix", "--force-base")[0] == 0


def test_compare_warns_if_fingerprints_name_two_bases(lorakit, two, tmp_path):
    other = lk.Adapter.load(two[0])
    other = replace(other, metadata={"fingerprint": {**other.metadata["fingerprint"], "architecture": "Other"}})
    code, out, error = lorakit("compare", two[0], other.save(tmp_path / "other"))
    assert (code, error) == (0, "")
    assert "trained on different bases" in out
    assert "LlamaForCausalLM and Other" in out


def test_inspect_warns_about_a_different_base(lorakit, two, model, tmp_path):
    other = tiny_lm.llama(seed=1)
    folder = tmp_path / "other"
    other.save_pretrained(folder)
    code, out, error = lorakit("inspect", two[0], "--base", folder)
    assert (code, error) == (0, "")
    assert "trained on a different base than the one given" in out
    assert (
        "weights: model.embed_tokens.weight holds other values" in out
        or "weights: lm_head.weight holds other values" in out
    )
    assert json.loads(lorakit("inspect", two[0], "--base", folder, "--json")[1])["unlike_base"]
    assert "different base" not in lorakit("inspect", two[0], "--base", model)[1]


def test_inspect_does_not_count_a_packed_projections_zeros(lorakit, tmp_path):
    B = torch.zeros(12, 4)
    B[:4, :2], B[8:, 2:] = torch.randn(4, 2), torch.randn(4, 2)
    f = Factors(torch.randn(4, 9), B, 2.0, parts=(True, False, True))
    lk.Adapter(
        lk.LoraConfig(rank=2, alpha=2, targets=["qkv"], packed={"qkv": [True, False, True]}), {"l.0.qkv": f}
    ).save(tmp_path / "a")
    out = lorakit("inspect", tmp_path / "a")[1]
    assert "52 parameters in 1 modules" in out  # A 36, two blocks of 4 x 2
    assert out.count("the zeros between their blocks are not counted as parameters") == 1
