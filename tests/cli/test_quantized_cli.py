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


def test_it_is_merged_into_the_unquantized_base_and_not_into_this(lorakit, folders, trained, tmp_path):
    dense, packed = folders
    code, _, error = lorakit("merge", packed, trained / "adapter", tmp_path / "out")
    assert (code, "is quantized" in error, (tmp_path / "out").exists()) == (1, True, False)
    assert lorakit("merge", dense, trained / "adapter", tmp_path / "out")[0] == 0
    code, out, _ = lorakit("inspect", trained / "adapter", "--base", dense)
    assert code == 0
    assert "another base" not in out


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
