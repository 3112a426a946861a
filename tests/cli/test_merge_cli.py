"""`lorakit merge`: the merged model computes what base and adapter do, and nothing is replaced by accident."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

import lorakit as lk
from lorakit.bases.load import load_model

CPU = torch.device("cpu")


def test_the_merged_model_answers_like_base_and_adapter(lorakit, model, trained, tmp_path):
    out = tmp_path / "merged"
    code, told, error = lorakit("merge", model, trained / "adapter", out)
    assert code == 0, error
    assert told.splitlines()[-1] == f"next: lorakit generate 'Once upon a time' --model {out}"
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        adapted = lk.attach(load_model(model, torch.float32, CPU), lk.Adapter.load(trained / "adapter"))(ids).logits
        torch.testing.assert_close(load_model(str(out), torch.float32, CPU)(ids).logits, adapted, atol=1e-4, rtol=1e-4)
    code, _, error = lorakit("merge", model, trained / "adapter", out)
    assert code == 1
    assert "--force" in error
    code, told, _ = lorakit("merge", model, trained / "adapter", out, "--force", "--json", "--dtype", "bf16")
    assert code == 0
    assert isinstance(json.loads(told), dict)
    assert load_model(str(out), torch.bfloat16, CPU).dtype == torch.bfloat16
    assert lorakit("generate", "Ada", "--model", out, "--max-new-tokens", "2")[0] == 0


def test_the_report_groups_targets_by_kind_and_lists_each_on_request(lorakit, model, trained, tmp_path):
    code, told, error = lorakit("merge", model, trained / "adapter", tmp_path / "a")
    assert code == 0, error
    row = next(line.split() for line in told.splitlines() if line.startswith("self_attn.q_proj"))
    assert row[1:4] == ["2", "32x32", "4"]  # both layers' in one row
    assert "layers.0" not in told
    assert re.search(r"targets merged, largest \|ΔW\| [\d.]+; \d+ other tensors byte-identical", told)
    code, told, _ = lorakit("merge", model, trained / "adapter", tmp_path / "b", "--modules")
    assert all(f"model.layers.{i}.self_attn.q_proj" in told for i in range(2))


def test_merge_with_several_weighted_adapters(lorakit, model, trained, tmp_path):
    adapter, out = trained / "adapter", tmp_path / "out"
    code, _, error = lorakit("merge", model, adapter, adapter, out, "--weights", "0.75,0.25")
    assert code == 0, error
    note = (out / "lorakit_merge.json").read_text()
    assert "0.75 x adapter, 0.25 x adapter" in note
    assert str(tmp_path) not in note
    assert str(trained) not in note
    assert lorakit("merge", model, adapter, tmp_path / "once")[0] == 0
    twice, once = (load_model(str(tmp_path / name), torch.float32, CPU).state_dict() for name in ("out", "once"))
    for name in once:
        torch.testing.assert_close(twice[name], once[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "args,code,said",
    [
        (("ADAPTER",), 2, "one or several adapters, and OUT"),
        (("ADAPTER", "ADAPTER", "OUT", "--weights", "0.5"), 2, "1 weights for 2 adapters"),
        (("ADAPTER", "OUT", "--weights", "half"), 2, "'half' is not a list of numbers"),
        (("nowhere", "OUT"), 1, "no adapter at 'nowhere'"),
    ],
)
def test_an_impossible_merge_is_explained_and_writes_nothing(args, code, said, lorakit, model, trained, tmp_path):
    named = {"ADAPTER": trained / "adapter", "OUT": tmp_path / "out"}
    found, _, error = lorakit("merge", model, *(named.get(a, a) for a in args))
    assert (found, said in error) == (code, True), error
    assert not list(tmp_path.iterdir())


def test_merge_never_replaces_an_adapter_it_reads(lorakit, model, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for args in ((run / "adapter", run / "adapter"), (run, run / "adapter"), (run, run)):
        code, _, error = lorakit("merge", model, *args, "--force")
        assert (code, "the adapter" in error) == (1, True), error
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before
