"""A model folder whose weights bitsandbytes has quantized, on the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import quantized
import tiny_lm
import torch
from safetensors.torch import load_file

from lorakit.errors import LorakitError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The unquantized model's and the 4-bit model's."""
    return quantized.save(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def trained(folders, data, tmp_path_factory):
    from lorakit.cli import run

    out = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--quiet", "--save-every", "3", *tiny_lm.FLAGS]
    assert run(["train", "--model", str(folders[1]), "--data", data, "--out", str(out), *flags]) == 0
    return out


def test_it_trains_and_the_panel_says_what_it_is(lorakit, folders, data, tmp_path):
    code, out, error = lorakit(
        "train", "--model", folders[1], "--data", data, "--out", tmp_path / "run", *tiny_lm.FLAGS
    )
    assert code == 0, error
    assert "its weight is quantized (bitsandbytes, 4 bits)" in " ".join(out.replace("│", " ").split())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").open() if '"loss"' in line]
    assert losses[-1] < losses[0]


def test_a_resumed_run_ends_with_the_same_bits(lorakit, folders, data, trained, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "adapter")
    for checkpoint in (again / "checkpoints").iterdir():
        if checkpoint.name != "step-3":
            shutil.rmtree(checkpoint)
    flags = ["--quiet", "--save-every", "3", *tiny_lm.FLAGS]
    code, _, error = lorakit("train", "--model", folders[1], "--data", data, "--out", again, *flags)
    assert code == 0, error
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (trained, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_adapter_is_judged_on_both_bases_without_force(lorakit, folders, data, trained):
    losses = []
    for folder in folders:
        flags = ["--adapter", trained / "adapter", "--max-new-tokens", "4", "--json"]
        code, out, error = lorakit("eval", data, "--model", folder, *flags)
        assert code == 0, error
        losses.append([each["loss"] for each in json.loads(out)["results"]])
    dense, packed = map(torch.tensor, losses)
    torch.testing.assert_close(dense, packed, atol=0.02, rtol=0)  # of the base and of the adapter
    assert packed[1] < packed[0] - 0.2


def test_it_is_merged_into_the_unquantized_base_which_is_the_same_base(lorakit, folders, trained, tmp_path):
    dense, packed = folders
    assert lorakit("merge", dense, trained / "adapter", tmp_path / "out")[0] == 0
    for base in (dense, packed):
        code, out, _ = lorakit("inspect", trained / "adapter", "--base", base)
        assert code == 0
        assert "another base" not in out


def test_it_is_merged_into_its_own_base_which_becomes_an_ordinary_one(lorakit, folders, data, trained, tmp_path):
    packed = folders[1]
    code, out, error = lorakit("merge", packed, trained / "adapter", tmp_path / "out")
    assert code == 0, error
    assert "14 quantized weights written as bfloat16" in out
    losses = []
    for flags in (("--model", packed, "--adapter", trained / "adapter"), ("--model", tmp_path / "out")):
        code, out, error = lorakit("eval", data, *flags, "--max-new-tokens", "4", "--json")
        assert code == 0, error
        losses.append(json.loads(out)["results"][-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_onto_the_unquantized_base_says_what_differs(lorakit, folders, trained, tmp_path):
    dense, packed = folders
    code, out, error = lorakit("merge", packed, trained / "adapter", tmp_path / "out", "--onto", dense)
    assert code == 0, error
    assert "quantized base Q and unquantized base W; the worst 8 of 14" in out
    assert "‖Q-W‖" in out
    flags = ["--onto", dense, "--requantize", "same", "--json", "--force"]
    code, out, error = lorakit("merge", packed, trained / "adapter", tmp_path / "out", *flags)
    assert code == 0, error
    report = json.loads(out)
    assert len(report["requantized"]) == len(report["differences"]) == 14
    assert report["dtype"] == "nf4"
    assert lorakit("generate", "Ada", "--model", tmp_path / "out", "--max-new-tokens", "2")[0] == 0


def test_quantized_again_it_is_written_or_refused_by_the_share_kept(lorakit, folders, trained, tmp_path):
    packed, out = folders[1], tmp_path / "out"
    args = ["merge", packed, trained / "adapter", out, "--requantize", "nf4"]
    code, _, error = lorakit(*args, "--keep-at-least", "1")
    assert (code, out.exists()) == (1, False)
    assert "weights keep less than 100% of their ΔW" in error
    assert "--onto ORIGINAL" in error
    code, told, error = lorakit(*args, "--keep-at-least", "0")
    assert code == 0, error
    assert "14 weights quantized again as nf4; of ΔW" in told
    assert lorakit("generate", "Ada", "--model", out, "--max-new-tokens", "2")[0] == 0
    code, _, error = lorakit(*args, "--keep-at-least", "2", "--force")
    assert (code, "a share of ΔW, from 0 to 1" in error) == (2, True)


def test_full_fine_tuning_of_it_is_refused(lorakit, folders, data, tmp_path):
    flags = ["--method", "full", "--model", folders[1], "--data", data, "--out", tmp_path / "run"]
    code, _, error = lorakit("train", *flags, *tiny_lm.FLAGS)
    assert code == 2
    assert "method: full trains all weights, and 14 of this base are quantized" in error
    assert "load the unquantized base, or use --method lora" in error


def test_the_memory_check_counts_4_bits(folders, data, tmp_path):
    from lorakit.data.dataset import Item
    from lorakit.data.parse import Row
    from lorakit.train.memory import check

    rows = [Item([2] * 32, [True] * 32, Row({}, "", 1))]
    dense, packed = (
        check(tiny_lm.config(folder, data, tmp_path / "run"), torch.float32, torch.device("cpu"), rows, 0).value
        for folder in folders
    )
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    saved = dense.parts["weights"] - packed.parts["weights"]
    assert abs(saved - linears * (4 - 0.516)) < 0.01 * 4 * linears


def test_without_the_library_the_error_says_what_to_install(model, tmp_path, monkeypatch):
    from transformers.quantizers import quantizer_bnb_4bit

    from lorakit.bases.load import load_model

    folder = shutil.copytree(model, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(LorakitError, match=r"4-bit quantization requires bitsandbytes(.|\n)*'lorakit\[quant\]'"):
        load_model(str(folder), torch.float32, torch.device("cpu"))
