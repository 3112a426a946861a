"""How vLLM is started: each argument and variable, and what may not be passed on."""

from __future__ import annotations

import pytest

from lorakit.bases.load import embedded_folder
from lorakit.errors import ConfigError, LorakitError
from lorakit.export.rules import VLLM_RANKS
from lorakit.serve.vllm.argv import VllmSettings, command_line, environment, rank_flag


def test_the_command_line_is_exactly_this():
    settings = VllmSettings("Qwen/Qwen3-0.6B", ("/opt/vllm/bin/vllm",), max_rank=20, batched=4, in_memory=9)
    assert command_line(settings, "/tmp/s/1") == [
        *("/opt/vllm/bin/vllm", "serve", "Qwen/Qwen3-0.6B"),
        *("--uds", "/tmp/s/1"),
        *("--served-model-name", "base"),
        *("--generation-config", "vllm"),
        *("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "9", "--max-lora-rank", "32"),
        *("--max-logprobs", "20", "--enable-prompt-tokens-details"),
        *("--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}'),
    ]


def test_what_is_asked_for_is_added():
    settings = VllmSettings(
        "embedded",
        ("python", "-m", "vllm.entrypoints.cli.main"),
        revision="main",
        context=256,
        rows=16,
        precision="bf16",
        extra=("--gpu-memory-utilization=0.8", "--tensor-parallel-size", "2"),
    )
    argv = command_line(settings, "s")
    assert argv[:5] == ["python", "-m", "vllm.entrypoints.cli.main", "serve", str(embedded_folder())]
    assert argv[5:8] == ["--gpu-memory-utilization=0.8", "--tensor-parallel-size", "2"]
    optional = ["--revision", "main", "--max-model-len", "256", "--max-num-seqs", "16", "--dtype", "bfloat16"]
    assert argv[-8:] == optional


def test_ram_holds_at_least_what_a_batch_mixes():
    argv = command_line(VllmSettings("embedded", batched=80, in_memory=64), "s")
    assert argv[argv.index("--max-cpu-loras") + 1] == "80"  # vLLM refuses less than --max-loras


@pytest.mark.parametrize(
    "extra",
    [
        "--host=0.0.0.0",
        "--api-key",
        "--max_lora_rank=64",
        "--uds",
        "--served-model-name",
        "--logprobs-mode=x",
        "--structured-outputs-config.backend=outlines",
    ],
)
def test_flags_of_ours_are_refused_by_name(extra):
    with pytest.raises(ConfigError, match=extra.partition("=")[0].partition(".")[0].replace("_", "-")):
        command_line(VllmSettings("embedded", extra=(extra,)), "s")


@pytest.mark.parametrize("extra", ["--chat-template=x.jinja", "--enable-auto-tool-choice"])
def test_flags_without_effect_are_refused(extra):
    with pytest.raises(ConfigError, match="no effect"):
        command_line(VllmSettings("embedded", extra=(extra,)), "s")


def test_a_base_that_is_none(tmp_path):
    with pytest.raises(LorakitError, match=r"config\.json is missing"):
        command_line(VllmSettings(str(tmp_path)), "s")


@pytest.mark.parametrize(("ranks", "flag"), [([], 1), ([1], 1), ([3, 8], 8), ([9], 16), ([300, 4], 320), ([512], 512)])
def test_the_rank_flag_is_the_smallest_that_holds_all(ranks, flag):
    assert rank_flag(ranks) == flag
    assert flag in VLLM_RANKS


def test_a_rank_for_later_counts_and_one_too_large_is_refused():
    assert rank_flag([4], 33) == 64
    with pytest.raises(ConfigError, match="up to 512, and 600"):
        rank_flag([600])


def test_the_environment_has_the_key_and_no_traps():
    ambient = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "PYTHONPATH": "/ours",
        "PYTHONHOME": "/ours",
        "LORAKIT_API_KEY": "secret",
        "LORAKIT_MANAGE_KEY": "secret",
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_API_KEY": "theirs",
    }
    assert environment("key", ambient) == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "VLLM_API_KEY": "key",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
