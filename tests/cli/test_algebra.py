"""`lorakit combine`, `resize` and `extract`: what they write, what they print, and what they refuse."""

from __future__ import annotations

import json

import pytest
import tiny_lm
import torch

import lorakit as lk


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two adapters in PEFT's folders, with ranks 4 and 6."""
    folders = []
    for seed, rank in enumerate((4, 6)):
        made = torch.Generator().manual_seed(seed)
        names = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]
        pairs = {
            n: (torch.randn(rank, 32, generator=made), torch.randn(32 if "q_" in n else 16, rank, generator=made))
            for n in names
        }
        value = lk.Adapter(
            lk.LoraConfig(rank=rank, alpha=8, targets=["q_proj", "v_proj"]),
            {n: lk.Factors(A, B, 8.0) for n, (A, B) in pairs.items()},
        )
        folders.append(value.save(tmp_path_factory.mktemp("adapter") / f"a{seed}"))
    return folders


def test_combine_writes_the_exact_sum(lorakit, two, tmp_path):
    code, out, err = lorakit("combine", *two, "--weights", "0.7,-0.3", "--out", tmp_path / "mix")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("combined 2 adapters (linear): 4 modules, rank 10; ")
    assert lines[1] == "exact"
    assert lines[-1] == f"next: lorakit inspect {tmp_path / 'mix'}"
    mix, (a, b) = lk.Adapter.load(tmp_path / "mix"), map(lk.Adapter.load, two)
    for m, f in mix.factors.items():
        torch.testing.assert_close(
            f.delta(), 0.7 * a.factors[m].delta() - 0.3 * b.factors[m].delta(), rtol=1e-5, atol=1e-5
        )


def test_combine_with_ties_reports_its_error(lorakit, two, tmp_path):
    code, out, _ = lorakit(
        "combine", *two, "--method", "ties", "--density", "0.3", "--rank", "5", "--out", tmp_path / "mix", "--json"
    )
    report = json.loads(out)
    assert code == 0
    assert report["rank"] == lk.Adapter.load(tmp_path / "mix").rank == 5
    assert 0 < report["error"] < 1
    assert len(report["modules"]) == 4


def test_resize_by_rank_energy_and_error(lorakit, two, tmp_path):
    code, out, _ = lorakit("resize", two[1], tmp_path / "small", "--rank", "3", "--dtype", "bf16", "--modules")
    assert code == 0
    assert any(line.split()[1:3] == ["6", "3"] for line in out.splitlines())  # rank before and after
    assert "relative error" in out
    small = lk.Adapter.load(tmp_path / "small")
    assert small.rank == 3
    assert {f.A.dtype for f in small.factors.values()} == {torch.bfloat16}
    code, out, _ = lorakit("resize", two[1], tmp_path / "keep", "--keep", "0.9", "--overall", "--json")
    assert json.loads(out)["energy"] >= 0.9
    assert lorakit("resize", two[1], tmp_path / "err", "--error", "0.5")[0] == 0


def test_extract_prints_what_is_captured(lorakit, model, tmp_path):
    tuned = tiny_lm.llama()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "proj" in name or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    tiny_lm.save(tmp_path / "tuned", tuned)
    code, out, err = lorakit("extract", model, tmp_path / "tuned", tmp_path / "lora", "--rank", "8", "--save-rest")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("14 changed matrices, largest rank 8;")
    assert lines[1] == "5 other tensors changed: 5 saved in full"
    assert lines[2].startswith("captured: ")
    assert lines[-1].startswith("next: lorakit eval")
    assert lk.Adapter.load(tmp_path / "lora").saved
    code, out, _ = lorakit(
        "extract", model, tmp_path / "tuned", tmp_path / "some", "--keep", "1.0", "--target", "q_proj", "--json"
    )
    report = json.loads(out)
    assert len(report["modules"]) == 2
    assert 0 < report["captured"] < 1


def test_an_existing_out_is_kept_unless_forced(lorakit, two, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("x")
    for call in (["resize", two[0], tmp_path / "here", "--rank", "2"], ["combine", *two, "--out", tmp_path / "here"]):
        code, _, err = lorakit(*call)
        assert code == 2
        assert "exists\n  --force replaces it" in err
    code, _, err = lorakit("resize", two[0], tmp_path / "here", "--rank", "2", "--force")
    assert code == 2
    assert "is a folder with other files" in err
    assert (tmp_path / "here" / "mine").read_text() == "x"
    for force in ([], ["--force"]):
        assert lorakit("resize", two[0], tmp_path / "there", "--rank", "2", *force)[0] == 0


@pytest.mark.parametrize(
    "options, said",
    [
        (["--weights", "1,x"], "is not a list of numbers"),
        (["--weights", "1"], "2 adapters and 1 weights"),
        (["--method", "tie"], "did you mean 'ties'"),
        (["--method", "ties"], "needs a density"),
    ],
)
def test_a_usage_error_writes_nothing(lorakit, two, tmp_path, options, said):
    code, _, err = lorakit("combine", *two, "--out", tmp_path / "mix", *options)
    assert code == 2
    assert said in err
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize("verb", ["combine", "resize", "extract"])
def test_each_command_has_help(lorakit, verb):
    code, out, _ = lorakit(verb, "--help")
    assert code == 0
    assert f"Usage: lorakit {verb}" in out


def test_a_result_is_never_written_into_a_runs_folder(lorakit, two, tmp_path):
    """A run's folder stands for its adapter; writing into it would leave two adapters there."""
    run = tmp_path / "run"
    lk.Adapter.load(two[0]).save(run / "adapter")
    (run / "config.yaml").write_text("model: x")
    assert lorakit("resize", run, tmp_path / "small", "--rank", "2")[0] == 0
    code, _, err = lorakit("resize", two[1], run, "--rank", "2", "--force")
    assert code == 2
    assert "is a folder with other files" in err
    assert not (run / "adapter_config.json").exists()
