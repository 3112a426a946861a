"""`lorakit plan`: a config is enough, data is not asked for, and a script can read the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SMALL = [
    "--max-length",
    "64",
    "--micro-batch",
    "2",
    "--batch-size",
    "4",
    "--rank",
    "4",
    "--precision",
    "fp32",
    "--validation",
    "0",
]


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    """A folder with a config and nothing else: no weights, no tokenizer."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("big")
    LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return str(folder)


def test_a_config_is_enough_and_the_three_methods_stand_side_by_side(lorakit, config_only):
    code, out, error = lorakit("plan", "--model", config_only, "--memory", "2GB", "--device", "cuda", *SMALL)
    assert code == 0, error
    for words in (
        "full, float32",
        "LoRA",
        "LoRA, nf4",
        "W weights",
        "a activations",
        "at most",
        "fits 2 GB",
        "most rows of 64",
    ):
        assert words in out, words
    bars = [
        line.split()
        for line in out.splitlines()
        if line.startswith(("full, float32  ", "LoRA  ", "LoRA, nf4  ", "memory  "))
    ]
    assert len(bars) == 3  # 2 GB is beyond the longest
    assert "o" in bars[0][-3]  # the overhead's letter
    assert "next: lorakit train" in out


def test_every_setting_of_every_method_can_be_given(lorakit, config_only):
    from lorakit.cli.plan import _SETTINGS
    from lorakit.methods import method_names, method_of

    assert {name for method in method_names() for name in method_of(method).settings.model_fields} <= _SETTINGS
    given = ["--method", "bottleneck", "--bottleneck", "pfeiffer", "--bottleneck-size", "8", "--drop-layers", "1"]
    own = [word for flag in zip(SMALL[::2], SMALL[1::2], strict=True) if flag[0] != "--rank" for word in flag]
    code, out, error = lorakit("plan", "--model", config_only, "--memory", "2GB", "--json", *own, *given)
    assert code == 0, error
    trained = {each["method"]: each["trained"] for each in json.loads(out)["estimates"]}
    assert trained["bottleneck"] == 3 * (2 * 64 * 8 + 64 + 8)


def test_json_gives_the_numbers_of_the_table(lorakit, config_only):
    code, out, _ = lorakit(
        "plan", "--model", config_only, "--memory", "1500MB", "--json", *SMALL, "--targets", "q_proj,k_proj"
    )
    assert code == 0
    plan = json.loads(out)
    full, lora, four = plan["estimates"]
    assert [e["method"] for e in plan["estimates"]] == ["full", "lora", "nf4 lora"]
    assert lora["trained"] == 4 * 4 * ((64 + 64) + (64 + 32))
    assert full["trained"] == full["parameters"] == plan["parameters"]
    for estimate in plan["estimates"]:
        assert (
            estimate["total"]
            == sum(estimate["parts"].values())
            == max(sum(m.values()) for m in estimate["moments"].values())
        )
    assert four["parts"]["weights"] < lora["parts"]["weights"]
    assert plan["memory"] == 1_500_000_000
    assert plan["most_rows"]["lora"] >= plan["most_rows"]["full"] >= 1
    assert plan["step_flops"] > 0
    assert plan["step_seconds_at_least"] > 0


def test_the_optimizers_state_is_counted_as_asked(lorakit, config_only):
    _, out, _ = lorakit("plan", "--model", config_only, "--memory", "1KB", "--json", "--optimizer", "lion", *SMALL)
    assert [e["parts"]["optimizer"] / e["trained_bytes"] for e in json.loads(out)["estimates"]] == [1, 1, 1]


def test_a_config_file_is_read_as_train_reads_it(lorakit, config_only, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {config_only}\n"
        "data: nowhere.jsonl\n"
        "rank: 2\n"
        "max_length: 64\n"
        "learning_rate: 1e-3\n"
        "validation: 0\n"
        "epochs: 2\n"
    )
    code, out, _ = lorakit("plan", "--config", file, "--memory", "1KB", "--targets", "q_proj", "--json")
    assert code == 0
    assert json.loads(out)["estimates"][1]["trained"] == 4 * 2 * (64 + 64)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--memory", "plenty"], "'plenty' is not an amount of memory"),
        (["--max-length", "300"], "--max-length is 300, but"),
        (["--device", "cuda"], "give its memory"),
        (["--rnk", "8"], "--rank"),
        (["--optimizer", "rmsprop"], "rmsprop"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_exits_with_2(lorakit, config_only, args, message):
    code, _, error = lorakit("plan", "--model", config_only, *args)
    assert code == 2
    assert message in error


def test_a_target_that_matches_nothing_names_the_nearest(lorakit, config_only):
    code, _, error = lorakit("plan", "--model", config_only, "--targets", "q_pro", "--memory", "1GB")
    assert code == 1
    assert "did you mean 'q_proj'" in error


def test_a_model_that_is_not_there_is_an_error(lorakit, tmp_path):
    code, _, error = lorakit("plan", "--model", str(tmp_path / "none"), "--memory", "1GB")
    assert code == 1
    assert "there is no model folder" in error


def test_what_does_not_fit_is_said(lorakit, config_only):
    code, out, _ = lorakit("plan", "--model", config_only, "--memory", "1KB", *SMALL)
    assert code == 0
    assert "none" in next(line for line in out.splitlines() if line.startswith("most rows at once"))
    assert next(line for line in out.splitlines() if line.startswith("memory  ")).split()[1:] == ["|", "1", "KB"]
    assert "the run does not fit" in out


def test_a_base_that_is_to_be_quantized_is_planned_so(lorakit, config_only):
    flags = ["plan", "--model", config_only, "--memory", "2GB", *SMALL]
    code, out, error = lorakit(*flags, "--quantize", "int8", "--json")
    assert code == 0, error
    plan = json.loads(out)
    assert [e["method"] for e in plan["estimates"]] == ["full", "lora", "int8 lora"]
    code, out, error = lorakit(*flags, "--quantize", "nf4", "--no-double")
    assert code == 0, error
    assert "28 linears are stored as bitsandbytes nf4\n" in out
    assert "--quantize nf4 --no-double" in out.splitlines()[-1]


def test_where_only_a_quantized_base_fits_it_is_suggested(lorakit, config_only, tmp_path):
    values = json.loads((Path(config_only) / "config.json").read_text())
    wider = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 256}
    (tmp_path / "config.json").write_text(json.dumps(values | wider))
    flags = ["plan", "--model", tmp_path, "--device", "cuda", "--json", *SMALL]
    _, out, _ = lorakit(*flags, "--memory", "2GB")
    _, lora, nf4 = (estimate["total"] for estimate in json.loads(out)["estimates"])
    flags.remove("--json")
    code, out, error = lorakit(*flags, "--memory", f"{(lora + nf4) // 2}B")
    assert code == 0, error
    assert out.splitlines()[-1].startswith("next: lorakit train --model")
    assert "--quantize nf4" in out.splitlines()[-1]


def test_a_quantized_checkpoint_has_no_other_columns(lorakit, config_only, tmp_path):
    how = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    values = json.loads((Path(config_only) / "config.json").read_text()) | {"quantization_config": how}
    (tmp_path / "config.json").write_text(json.dumps(values))
    flags = ["plan", "--model", tmp_path, "--memory", "2GB", *SMALL]
    code, out, error = lorakit(*flags, "--json")
    assert code == 0, error
    assert [e["method"] for e in json.loads(out)["estimates"]] == ["gptq lora"]
    at = flags.index("--rank")
    code, _, error = lorakit(*flags[:at], *flags[at + 2 :], "--method", "full")
    assert code == 2
    assert "is quantized (GPTQ, 4 bits, groups of 64), and quantized weights cannot be trained (--method full)" in error
    code, _, error = lorakit(*flags, "--quantize", "nf4")
    assert code == 2
    assert "is quantized already: GPTQ, 4 bits, groups of 64\n  omit --quantize nf4, or give the unquantized" in error
