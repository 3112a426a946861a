"""`lorakit export --merged` and `convert --dtype q8_0`, on a trained adapter."""

from __future__ import annotations

import json

from gguf import GGUFReader


def test_a_merged_model_is_written_and_verified(lorakit, trained, model, tmp_path):
    out = tmp_path / "x.gguf"
    call = [
        "export",
        trained / "adapter",
        out,
        "--for",
        "llama.cpp",
        "--merged",
        "--base",
        model,
        "--dtype",
        "q8_0",
        "--verify",
    ]
    code, output, err = lorakit(*call)
    assert code == 0, err
    lines = output.splitlines()
    assert lines[0] == f"written for llama.cpp: {out}"
    assert lines[1].startswith("merged model in q8_0: 21 tensors, 0.")
    assert (
        lines[2]
        == "in f16, because their row length is not a multiple of 32: blk.0.ffn_down.weight, blk.1.ffn_down.weight"
    )
    assert lines[-2].startswith("read back: tensors off by at most 0.00")
    assert "; logits off by 0.0" in lines[-2]
    assert lines[-1] == f"next: llama-server -m {out}"
    code, _, err = lorakit(*call)
    assert code == 2
    assert "--force replaces it" in err
    code, output, err = lorakit(*call, "--force", "--json")
    assert code == 0, err
    assert json.loads(output)["verified"]["tensors"] < 0.0045


def test_for_ollama_a_folder_is_written(lorakit, trained, model, tmp_path):
    code, output, err = lorakit(
        "export", trained / "adapter", tmp_path / "o", "--for", "ollama", "--merged", "--base", model
    )
    assert code == 0, err
    assert output.splitlines()[-1] == f"next: ollama create mine -f {tmp_path / 'o' / 'Modelfile'}"
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["Modelfile", "model.gguf"]


def test_contradictory_options_are_usage_errors(lorakit, trained, model, tmp_path):
    def refused(*args):
        code, _, err = lorakit("export", trained / "adapter", tmp_path / "x.gguf", *args)
        assert code == 2
        assert not list(tmp_path.iterdir())
        return err

    assert "lorakit merge BASE ADAPTER OUT" in refused("--for", "peft", "--merged", "--base", model)
    assert "give --base FOLDER" in refused("--for", "llama.cpp", "--merged")
    assert "lorakit convert --to gguf --dtype" in refused("--for", "llama.cpp", "--base", model, "--dtype", "f16")
    assert "the Modelfile starts FROM the merged model" in refused(
        "--for", "ollama", "--merged", "--base", model, "--model", "llama3"
    )


def test_convert_writes_q8_0(lorakit, trained, model, tmp_path):
    code, _, err = lorakit(
        "convert", trained / "adapter", tmp_path / "x.gguf", "--to", "gguf", "--base", model, "--dtype", "q8_0"
    )
    assert code == 0, err
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "x.gguf").tensors}
    assert (kinds["blk.0.attn_q.weight.lora_a"], kinds["blk.0.attn_q.weight.lora_b"]) == ("Q8_0", "F16")
    code, _, err = lorakit("convert", trained / "adapter", tmp_path / "mlx", "--to", "mlx", "--dtype", "q8_0")
    assert code == 1
    assert "q8_0 is a type of GGUF's tensors" in err
