"""`lorakit card` and `lorakit push` on a trained run, with a stub hub."""

from __future__ import annotations

import json
import shutil

import hub_stub
import pytest


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stub.serve(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture
def run_folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_card_push_and_inspect_follow_from_the_printed_next_commands(lorakit, run_folder, hub):
    code, out, err = lorakit("card", run_folder, "--license", "apache-2.0", "--description", "Greets people.")
    assert code == 0, err
    assert f"written: {run_folder / 'adapter' / 'README.md'}" in out
    assert "left out, because unknown:\n" in out
    assert "--license" not in out
    assert out.splitlines()[-1] == f"next: lorakit push {run_folder} OWNER/NAME"
    code, out, err = lorakit(
        *out.splitlines()[-1].split()[2:-1], "someone/greets", "--private", "--base-model", "someone/tiny"
    )
    assert code == 0, err
    assert f"to {hub.url}/someone/greets:\n  README.md " in out
    assert "adapter_config.json, base_model_name_or_path: the base is called 'someone/tiny'" in out
    assert f"created: {hub.url}/someone/greets (commit " in out
    assert sorted(hub.files("someone/greets")) == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakit.json",
    ]
    assert b"license: apache-2.0" in hub.files("someone/greets")["README.md"]
    code, out, err = lorakit(*out.splitlines()[-1].split()[2:])
    assert code == 0, err
    assert out.startswith("someone/greets: rank 4")
    assert "base: someone/tiny" in out


def test_a_dry_run_prints_the_files_and_the_upload_command(lorakit, run_folder, hub):
    code, out, _ = lorakit("push", run_folder, "someone/lora", "--dry-run", "--private", "--revision", "v2")
    assert code == 0
    assert "adapter_model.safetensors" in out
    assert out.endswith(f"nothing was sent\nnext: lorakit push {run_folder} someone/lora --private --revision v2\n")
    assert hub.log == []
    options = ["--message", "the first", "--no-card", "--base-model", "a/b"]
    code, out, _ = lorakit("push", run_folder, "someone/lora", "--dry-run", *options)
    assert out.endswith(
        f"next: lorakit push {run_folder} someone/lora --message 'the first' --no-card --base-model a/b\n"
    )
    code, out, _ = lorakit("push", run_folder, "someone/lora", "--dry-run", "--no-card", "--json")
    report = json.loads(out)
    assert (report["dry_run"], report["card"], "README.md" in report["files"]) == (True, "none", False)


def test_push_reports_shortened_paths_remaining_paths_and_ignored_options(lorakit, run_folder, hub):
    notes = run_folder / "adapter" / "lorakit.json"
    content = json.loads(notes.read_text()) | {
        "by": "/home/alice/train.py",
        "about": "rows of /home/alice/x",
        "all": ["on /home/b/x"] * 30,
    }
    notes.write_text(json.dumps(content))
    (run_folder / "adapter" / "README.md").write_text("# by hand")
    call = ("push", run_folder, "someone/lora", "--base-model", "someone/tiny", "--dry-run")
    code, out, _ = lorakit(*call)
    assert code == 0
    assert "changed in the upload: lorakit.json, by: a local path is cut to 'train.py'\n" in out
    assert "left unchanged: lorakit.json, about: holds a local path\n" in out
    assert "left unchanged: and 11 more (--json prints all)\n" in out
    assert "--base-model someone/tiny does not change the card, which stays as it is here\n" in out
    assert f"  edit it, or write one here: lorakit card {run_folder} --base-model someone/tiny\n" in out
    printed = json.loads(lorakit(*call, "--json")[1])
    assert len(printed["left"]) == 31
    assert printed["not_on_card"] == ["--base-model someone/tiny"]
    assert json.loads(notes.read_text()) == content


def test_exit_code_is_1_for_a_refusal_and_2_for_a_usage_error(lorakit, run_folder, hub, monkeypatch, tmp_path):
    assert lorakit("push", run_folder, "alone")[0] == 2
    assert lorakit("card", run_folder, "--license", "Apache 2")[0] == 2
    assert lorakit("card", "someone/x@v1/y.gguf")[0] == 1
    (tmp_path / "README.md").write_text("mine")
    code, _, err = lorakit("card", run_folder, "--out", tmp_path / "README.md")
    assert code == 2
    assert "--force replaces it" in err
    assert (tmp_path / "README.md").read_text() == "mine"
    assert lorakit("card", run_folder, "--out", tmp_path / "README.md", "--force")[0] == 0
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = lorakit("push", run_folder, "someone/lora")
    assert (code, "the token was refused" in err, "Traceback" in err) == (1, True, False)
    assert "hf_wrong" not in err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = lorakit("push", run_folder, "someone/lora")
    assert (code, "it cannot be reached" in err) == (1, True)


def test_the_card_of_a_hub_adapter_is_written_to_out(lorakit, run_folder, hub, tmp_path):
    assert lorakit("push", run_folder, "someone/lora", "--no-card")[0] == 0
    code, _, err = lorakit("card", "someone/lora")
    assert code == 2
    assert "--out README.md" in err
    code, out, _ = lorakit(
        "card", "someone/lora", "--out", tmp_path / "card.md", "--repository", "someone/lora", "--json"
    )
    assert code == 0
    assert json.loads(out)["card"] == str(tmp_path / "card.md")
    assert '"someone/lora"' in (tmp_path / "card.md").read_text()
