"""`lorakit edit`: each change is read back, and impossible ones are refused."""

from __future__ import annotations

import json

import pytest
import torch

import lorakit as lk


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    made = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]
    factors = {
        n: lk.Factors(torch.randn(4, 32, generator=made), torch.randn(32, 4, generator=made), 8.0) for n in names
    }
    return lk.Adapter(lk.LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"]), factors).save(
        tmp_path_factory.mktemp("adapter") / "a"
    )


def test_scaling_and_negation_change_every_update_and_nothing_else(lorakit, adapter, tmp_path):
    before = lk.Adapter.load(adapter)
    for scale in (0.5, -1.0):
        code, out, error = lorakit("edit", adapter, tmp_path / str(scale), "--scale", scale)
        assert (code, error) == (0, "")
        assert out.splitlines()[-1] == f"next: lorakit inspect {tmp_path / str(scale)}"
        for module, f in lk.Adapter.load(tmp_path / str(scale)).factors.items():
            torch.testing.assert_close(f.delta(), scale * before.factors[module].delta())


def test_drop_rename_and_dtype(lorakit, adapter, tmp_path):
    code, out, error = lorakit(
        "edit",
        adapter,
        tmp_path / "out",
        "--drop",
        "v_proj",
        "--rename",
        "model=language_model",
        "--dtype",
        "bf16",
        "--json",
    )
    assert (code, error) == (0, "")
    assert json.loads(out)["modules"] == 2
    after = lk.Adapter.load(tmp_path / "out")
    assert sorted(after.factors) == [f"language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert after.factors["language_model.layers.0.self_attn.q_proj"].A.dtype == torch.bfloat16
    assert lorakit("edit", adapter, tmp_path / "v.pt", "--only", "v_proj", "--to", "loralib")[0] == 0
    assert len(lk.Adapter.load(tmp_path / "v.pt", alpha=8).factors) == 2


def test_the_next_command_gives_the_alpha_that_loralib_files_lack(lorakit, adapter, tmp_path):
    assert lorakit("edit", adapter, tmp_path / "a.pt", "--scale", 2, "--to", "loralib")[0] == 0
    code, out, error = lorakit("edit", tmp_path / "a.pt", tmp_path / "b.pt", "--scale", 0.5, "--alpha", 16)
    assert (code, out.splitlines()[-1]) == (0, f"next: lorakit inspect {tmp_path / 'b.pt'} --alpha 8"), error
    before = lk.Adapter.load(adapter)
    for module, f in lk.Adapter.load(tmp_path / "b.pt", alpha=8).factors.items():
        torch.testing.assert_close(f.delta(), before.factors[module].delta())


@pytest.mark.parametrize(
    "options,code,said",
    [
        ((), 2, "nothing to change"),
        (("--drop", "k_proj"), 1, "no module of this adapter matches 'k_proj'; did you mean"),
        (("--rename", "model"), 2, "'model' is not of the form OLD=NEW"),
        (("--rename", "modle=m"), 1, "no module's name is or starts with 'modle'"),
        (("--scale", "0"), 2, "would leave nothing"),
        (("--scale", "nan"), 2, "cannot be scaled by nan"),
        (("--scale", "2", "--to", "keft"), 2, "no such format"),
        (("--scale", "2", "--to", "gguf"), 2, "ends in .gguf"),
        (("--only", "q_proj", "--drop", "q_proj"), 1, "nothing would be left"),
    ],
    ids=str,
)
def test_impossible_edits_are_refused_and_nothing_is_written(options, code, said, lorakit, adapter, tmp_path):
    exit_code, _, error = lorakit("edit", adapter, tmp_path / "out", *options)
    assert (exit_code, said in error) == (code, True), error
    assert not list(tmp_path.iterdir())


def test_an_existing_out_is_kept_without_force(lorakit, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, _, error = lorakit("edit", adapter, tmp_path / "out", "--scale", "2")
    assert code == 2
    assert "--force" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
