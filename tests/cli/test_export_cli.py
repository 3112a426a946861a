"""`lorakit convert` and `lorakit export`, on a trained adapter."""

from __future__ import annotations

import json

import torch

import lorakit as lk
from lorakit import formats


def test_convert_writes_every_format(lorakit, trained, model, tmp_path):
    expected = lk.Adapter.load(trained / "adapter")
    for to, name in (("mlx", "mlx"), ("gguf", "lora.gguf"), ("loralib", "lora.pt"), ("peft", "peft")):
        code, out, err = lorakit("convert", str(trained / "adapter"), str(tmp_path / name), "--to", to, "--base", model)
        assert code == 0, err
        assert f"(peft) -> {tmp_path / name} ({to})" in out
        assert out.splitlines()[-1].startswith(f"next: lorakit inspect {tmp_path / name}")
        code, _, err = lorakit(*out.splitlines()[-1].split()[2:])
        assert code == 0, f"the printed next command fails: {err}"
        options = {"alpha": expected.config.alpha} if to == "loralib" else {}
        found = formats.load(tmp_path / name, base=model, **options)
        for module, f in expected.factors.items():
            torch.testing.assert_close(found.factors[module].delta(), f.delta(), rtol=1e-4, atol=1e-6)


def test_convert_refuses_a_loss_unless_allowed(lorakit, trained, tmp_path):
    code, _, err = lorakit("convert", str(trained / "adapter"), str(tmp_path / "x.safetensors"), "--to", "kohya")
    assert code == 1
    assert "kohya cannot hold all of this adapter" in err
    assert not (tmp_path / "x.safetensors").exists()
    code, out, _ = lorakit("convert", str(trained / "adapter"), str(tmp_path / "x"), "--to", "mlx", "--json")
    assert code == 0
    assert json.loads(out)["from"] == "peft"
    assert json.loads(out)["left_out"] == []


def test_export_checks_fixes_verifies_and_prints_the_next_command(lorakit, trained, model, tmp_path):
    code, _, err = lorakit("export", str(trained / "adapter"), str(tmp_path / "out"), "--for", "vllm")
    assert code == 1
    assert "vllm does not accept this adapter" in err
    assert "--fix" in err
    assert not (tmp_path / "out").exists()
    code, out, err = lorakit(
        "export", str(trained / "adapter"), str(tmp_path / "out"), "--for", "vllm", "--fix", "--verify", "--base", model
    )
    assert code == 0, err
    assert "fixed: " in out
    assert "read back: ΔW off by at most" in out
    assert out.splitlines()[-1] == f"next: vllm serve {model} --enable-lora --lora-modules mine={tmp_path / 'out'}"
    code, out, err = lorakit(
        "export",
        str(trained / "adapter"),
        str(tmp_path / "x.gguf"),
        "--for",
        "llama.cpp",
        "--base",
        model,
        "--verify",
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["difference"] < 1e-6


def test_usage_errors_exit_with_2_and_unreadable_files_with_1(lorakit, trained, tmp_path):
    assert lorakit("convert", str(trained / "adapter"), str(tmp_path / "x"), "--to", "pfet")[0] == 2
    assert lorakit("export", str(trained / "adapter"), str(tmp_path / "x"), "--for", "vlm")[0] == 2
    code, _, err = lorakit("convert", str(tmp_path / "none"), str(tmp_path / "x"), "--to", "peft")
    assert code == 1
    assert "no such file or folder" in err
    (tmp_path / "notes.safetensors").write_text("not tensors")
    code, _, err = lorakit("convert", str(tmp_path / "notes.safetensors"), str(tmp_path / "x"), "--to", "peft")
    assert code == 1
    assert "not a readable safetensors file" in err


def test_existing_output_is_never_lost(lorakit, trained, model, tmp_path):
    source = str(trained / "adapter")
    (tmp_path / "note.safetensors").write_text("mine")
    code, _, err = lorakit("convert", source, str(tmp_path / "note.safetensors"), "--to", "loralib")
    assert code == 2
    assert "--force" in err
    assert (tmp_path / "note.safetensors").read_text() == "mine"
    assert lorakit("convert", source, str(tmp_path / "a"), "--to", "peft")[0] == 0
    config = (tmp_path / "a" / "adapter_config.json").read_bytes()
    code, _, err = lorakit("convert", source, str(tmp_path / "a"), "--to", "mlx", "--force")
    assert code == 2
    assert "a folder with an adapter in peft's format" in err
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == config
    assert lorakit("convert", source, str(tmp_path / "a"), "--to", "peft", "--force")[0] == 0
    code, _, err = lorakit("export", source, model, "--for", "peft", "--force")
    assert code == 2
    assert "holds a model" in err


def test_out_names_that_do_not_fit_the_format_are_refused(lorakit, trained, tmp_path):
    source = str(trained / "adapter")
    for to, name, said in (
        ("peft", "x.safetensors", "written as a folder"),
        ("mlx", "x.gguf", "written as a folder"),
        ("gguf", "x.safetensors", "ends in .gguf"),
        ("kohya", "x", "ends in .safetensors"),
        ("loralib", "x", "ends in .pt"),
    ):
        code, _, err = lorakit("convert", source, str(tmp_path / name), "--to", to)
        assert code == 2
        assert said in err
    assert lorakit("resize", source, str(tmp_path / "x"), "--rank", "1", "--to", "xx")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_different_modelfile_is_replaced_only_with_force(lorakit, trained, model, tmp_path):
    (tmp_path / "Modelfile").write_text("FROM mine\n")
    calls = (
        ["export", trained / "adapter", tmp_path / "a.gguf", "--for", "ollama", "--base", model, "--model", "llama3.2"],
        ["export", trained / "adapter", tmp_path / "b.gguf", "--for", "ollama", "--base", model, "--merged"],
    )
    for call in calls:
        code, _, err = lorakit(*call)
        assert code == 2
        assert "Modelfile exists with other content" in err
        assert [p.name for p in tmp_path.iterdir()] == ["Modelfile"]
        assert (tmp_path / "Modelfile").read_text() == "FROM mine\n"
    for call in calls:
        assert lorakit(*call, "--force")[0] == 0
    assert (tmp_path / "Modelfile").read_text() == "FROM ./b.gguf\n"
