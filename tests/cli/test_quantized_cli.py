"""A model folder whose weights bitsandbytes has quantized, on the command line."""

from __future__ import annotations

import json
import shutil

import packed_checkpoints
import pytest
import quantized
import tiny_lm
import torch
import yaml
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
    code, _, error = lorakit("train", *flags, *tiny_lm.WITHOUT_RANK)
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
    assert abs(saved - linears * (4 - 4.5 / 8)) < 0.01 * 4 * linears


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


# ---- quantized while loading: --quantize ----

QUANTIZERS = ["nf4", "fp4", "int8", "torchao-int8"]


@pytest.fixture(scope="module")
def quantized_run(folders, data, tmp_path_factory):
    """A run on the unquantized folder with --quantize nf4 --no-double, which the saved checkpoint has."""
    from lorakit.cli import run

    out = tmp_path_factory.mktemp("quantized") / "run"
    flags = ["--quiet", "--quantize", "nf4", "--no-double", *tiny_lm.FLAGS]
    assert run(["train", "--model", str(folders[0]), "--data", data, "--out", str(out), *flags]) == 0
    return out


def test_a_run_records_how_its_base_was_quantized_and_is_that_of_the_saved_checkpoint(quantized_run, folders, trained):
    config = yaml.safe_load((quantized_run / "config.yaml").read_text())
    assert (config["quantize"], config["double"], config["compute_dtype"]) == ("nf4", False, "auto")
    record = json.loads((quantized_run / "adapter" / "lorakit.json").read_text())
    assert (record["recipe"]["quantize"], record["recipe"]["double"]) == ("nf4", False)
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (quantized_run, trained))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_its_adapter_is_used_on_either_base_without_force(lorakit, folders, data, quantized_run):
    dense, packed = folders
    adapter = ["--adapter", quantized_run / "adapter", "--max-new-tokens", "4"]
    losses = []
    for flags in (["--model", dense], ["--model", dense, "--quantize", "nf4"], ["--model", packed]):
        code, out, error = lorakit("eval", data, *flags, *adapter, "--json", "--precision", "fp32")
        assert code == 0, error
        losses.append(json.loads(out)["results"][1]["loss"])
        code, out, error = lorakit("generate", "Ada: 1\\n", *flags, *adapter)
        assert (code, error) == (0, "")
    assert max(losses) - min(losses) < 0.05
    assert len(set(losses)) == 3  # the weights do differ


def test_the_next_commands_quantize_too(lorakit, folders, data, quantized_run, tmp_path):
    flags = ["--model", folders[0], "--data", data, "--out", tmp_path / "run", *tiny_lm.FLAGS]
    code, out, error = lorakit("train", *flags, "--quiet", "--quantize", "nf4", "--no-double")
    assert code == 0, error
    assert all("--quantize nf4 --no-double" in line for line in out.splitlines() if "lorakit " in line)
    code, out, _ = lorakit(
        "eval", data, "--model", folders[0], "--adapter", quantized_run / "adapter", "--no-text", "--quantize", "int8"
    )
    assert code == 0
    assert out.splitlines()[-1].startswith("next: lorakit chat --model")
    assert "--quantize int8" in out.splitlines()[-1]


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_command_that_loads_a_base_takes_every_quantizer(lorakit, folders, data, quantized_run, tmp_path, kind):
    if kind == "torchao-int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    base = ["--model", folders[0], "--quantize", kind]
    adapter = ["--adapter", quantized_run / "adapter"]
    code, _, error = lorakit("train", *base, "--data", data, "--out", tmp_path / "run", *tiny_lm.FLAGS, "--quiet")
    assert code == 0, error
    code, out, error = lorakit("eval", data, *base, *adapter, "--no-text", "--json")
    assert code == 0, error
    assert json.loads(out)["results"][1]["loss"] < json.loads(out)["results"][0]["loss"]
    code, _, error = lorakit("generate", "Ada: 1\\n", *base, *adapter, "--max-new-tokens", "3")
    assert code == 0, error
    code, out, error = lorakit("chat", *base, *adapter, "--max-new-tokens", "3", stdin="Ada: 1\n/base\nBo: 2\n/quit\n")
    assert code == 0, error
    sweep = ["--data", data, "--out", tmp_path / "sweep", *tiny_lm.FLAGS, "--quiet", "--json"]
    sweep[sweep.index("--rank") + 1] = "2,4"
    code, out, error = lorakit("sweep", *base, *sweep)
    assert code == 0, error
    assert len(json.loads(out)["runs"]) == 2


def test_a_resumed_run_must_quantize_its_base_in_the_same_way(lorakit, folders, data, quantized_run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(quantized_run, again)
    flags = ["--model", folders[0], "--data", data, "--out", again, *tiny_lm.FLAGS, "--quiet"]
    code, _, error = lorakit("train", *flags)
    assert code == 1
    assert "  --quantize: was 'nf4', is now None\n" in error
    assert "  --double: was False, is now True\n" in error
    assert lorakit("train", *flags, "--quantize", "nf4", "--no-double")[0] == 0


@pytest.mark.parametrize(
    "how", [packed_checkpoints.gptq_config(), packed_checkpoints.awq_config()], ids=["gptq", "awq"]
)
def test_packed_checkpoints_are_trained_and_evaluated(lorakit, folders, data, how, tmp_path):
    made = quantized.llama(vocabulary=258, positions=tiny_lm.POSITIONS)
    folder, _ = packed_checkpoints.save(tmp_path / "packed", how, made)
    tiny_lm.tokenizer().save_pretrained(folder)
    flags = ["--model", folder, "--data", data, "--out", tmp_path / "run", *tiny_lm.FLAGS, "--quiet"]
    code, _, error = lorakit("train", *flags)
    assert code == 0, error
    losses = []
    for base in (folder, folders[0]):
        adapter = ["--adapter", tmp_path / "run" / "adapter", "--no-text", "--json"]
        code, out, error = lorakit("eval", data, "--model", base, *adapter)
        assert code == 0, error
        losses.append([each["loss"] for each in json.loads(out)["results"]])
    assert losses[0][1] < losses[0][0] - 0.2
    assert abs(losses[0][1] - losses[1][1]) < 0.1


def test_quantizing_a_quantized_checkpoint_says_what_it_is(lorakit, folders):
    code, _, error = lorakit("generate", "x", "--model", folders[1], "--quantize", "int8")
    assert code == 2
    assert "packed is quantized already: bitsandbytes nf4\n" in error
    assert "omit --quantize int8, or give the unquantized base" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--quantize", "nf5"], "nf5"),
        (["--no-double"], "double needs --quantize nf4 or --quantize fp4; omit it"),
        (["--quantize", "int8", "--compute-dtype", "bf16"], "--compute-dtype needs --quantize nf4 or --quantize fp4"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_loaded(lorakit, flags, message, data, tmp_path):
    for command in (["generate", "x"], ["eval", data], ["train", "--data", data, "--out", tmp_path / "run"]):
        code, _, error = lorakit(*command, "--model", "/nowhere", *flags)
        assert code == 2
        assert message in " ".join(error.split())


def test_what_cannot_be_quantized_is_refused(lorakit, folders, model, data, tmp_path):
    run = ["train", "--data", data, "--out", tmp_path / "run", *tiny_lm.FLAGS, "--quantize", "nf4"]
    full = ["train", "--data", data, "--out", tmp_path / "run", *tiny_lm.WITHOUT_RANK, "--quantize", "nf4"]
    code, _, error = lorakit(*full, "--model", folders[0], "--method", "full")
    assert code == 2
    assert "method: full trains all weights" in error
    code, _, error = lorakit(*run, "--model", folders[0], "--compile")
    assert (code, "compile is not tested with" in error) == (2, True)
    code, _, error = lorakit(*run, "--model", model)  # of width 32
    assert (code, "has no linear that can be quantized to nf4" in error) == (2, True)
    code, _, error = lorakit(*run, "--task", "text_to_image")
    assert (code, "task text_to_image does not have it" in error) == (2, True)
    assert not (tmp_path / "run" / "config.yaml").exists() or error


def test_loftq_finds_the_weights_from_before_quantization(lorakit, folders, data, tmp_path):
    """It starts from what rounding has changed: from the checkpoint that --quantize read."""
    run = ["train", "--model", folders[0], "--data", data, "--out", tmp_path / "run", *tiny_lm.FLAGS, "--quiet"]
    code, _, error = lorakit(*run, "--quantize", "nf4", "--init", "loftq")
    assert code == 0, error
