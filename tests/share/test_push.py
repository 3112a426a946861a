"""Uploading an adapter to a stub of the hub: what is uploaded, what never is, and the errors when the hub refuses."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from dataclasses import replace

import hub_stub
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from sample_adapter import adapter, same

import lorakit as lk
from lorakit import formats
from lorakit.errors import AdapterError, ConfigError, LorakitError
from lorakit.formats.peft_prompts import ENCODER, FOLDER
from lorakit.share import card_of, write
from lorakit.share.push import push
from lorakit.share.upload import check

NAMES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lorakit.json"]


def test_a_pushed_adapter_loads_from_its_hub_id_bit_for_bit(hub, folder):
    done = push(folder, "someone/lora")
    assert (done.created, done.card, done.url) == (True, "written", f"{hub.url}/someone/lora")
    there = hub.files("someone/lora")
    assert sorted(there) == [".gitattributes", *NAMES]
    assert all(there[name] == (folder / name).read_bytes() for name in NAMES[1:])
    assert done.files == {name: len(there[name]) for name in NAMES}
    assert same(lk.Adapter.load("someone/lora"), lk.Adapter.load(folder))
    assert b'lk.Adapter.load("someone/lora")' in there["README.md"]


def test_a_push_is_one_commit_with_the_tensors_in_lfs(hub, folder):
    push(folder, "someone/lora", message="the first")
    commits = [json.loads(line) for path, body in hub.bodies if "/commit/" in path for line in body.splitlines()]
    assert commits[0] == {"key": "header", "value": {"summary": "the first", "description": ""}}
    assert {line["value"]["path"]: line["key"] for line in commits[1:]} == {
        "README.md": "file",
        "adapter_config.json": "file",
        "lorakit.json": "file",
        "adapter_model.safetensors": "lfsFile",
    }
    assert list(hub.large.values()) == [(folder / "adapter_model.safetensors").read_bytes()]
    assert len(hub.repositories["someone/lora"].commits) == 2  # the repository's first, and this
    again = push(folder, "someone/lora", card=False)
    assert (again.created, again.changed) == (False, False)
    assert len(hub.repositories["someone/lora"].commits) == 2


def test_only_the_adapters_own_files_are_uploaded(hub, folder):
    for name in (
        ".env",
        "optimizer.safetensors",
        "rows.jsonl",
        "adapter_model.bin",
        "config.json.bak",
        ".adapter_config.json.x.tmp",
    ):
        (folder / name).write_text("HF_TOKEN=secret")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "adapter_model.safetensors").write_text("x")
    assert sorted(push(folder, "someone/lora").files) == NAMES
    assert sorted(hub.files("someone/lora")) == [".gitattributes", *NAMES]
    assert not any(b"secret" in body for _, body in hub.bodies)


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_virtual_tokens_and_their_encoder_are_pushed_and_come_back(hub, tmp_path, name):
    both = lk.LoraConfig(rank=2, targets=["q_proj"], prompt=name, virtual_tokens=3)
    alone = lk.LoraConfig(variant=name, virtual_tokens=3)
    encoder = [] if name == "prompt" else [ENCODER]
    for config, extra in ((both, [f"{FOLDER}/{file}" for file in [*NAMES[1:], *encoder]]), (alone, encoder)):
        adapter = lk.capture(lk.attach(tiny.llama(), config))
        folder = tmp_path / ("both" if config is both else "alone")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT loads LoRA and virtual tokens one at a time
            adapter.save(folder)
        pushed = push(folder, f"someone/{folder.name}", base_model="someone/tiny")
        assert sorted(pushed.files) == sorted([*NAMES, *extra])
        there = lk.Adapter.load(f"someone/{folder.name}")
        assert there.digest() == adapter.digest()
        assert there.updates["base_model"].encoder.keys() == adapter.updates["base_model"].encoder.keys()


def test_virtual_tokens_of_another_adapter_in_the_folder_are_not_uploaded(hub, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lk.capture(lk.attach(tiny.llama(), lk.LoraConfig(variant="p_tuning", virtual_tokens=3))).save(folder / FOLDER)
    (folder / ENCODER).write_bytes(b"strange")
    assert sorted(push(folder, "someone/lora").files) == NAMES


def test_what_would_be_uploaded_is_checked_and_not_the_folder(folder):
    files = {name: folder / name for name in NAMES[1:2]}  # without the tensors
    with pytest.raises(AdapterError, match=f"nothing was uploaded: {folder} holds no weights"):
        check(files, folder, "peft", None, None)


def test_a_linked_folder_of_virtual_tokens_is_not_followed(hub, tmp_path):
    config = lk.LoraConfig(rank=2, targets=["q_proj"], prompt="prompt", virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lk.capture(lk.attach(tiny.llama(), config)).save(tmp_path / "adapter")
    (tmp_path / "adapter" / FOLDER).rename(tmp_path / "elsewhere")
    (tmp_path / "adapter" / FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="leads out of its folder"):
        push(tmp_path / "adapter", "someone/lora")
    assert hub.repositories == {}


def test_a_dry_run_sends_no_request_and_needs_no_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    told = []
    done = push(folder, "someone/lora", dry_run=True, tell=told.append)
    assert told == [done]
    assert sorted(done.files) == NAMES
    assert hub.log == []
    assert not (folder / "README.md").exists()


def test_a_branch_is_created_and_read_by_its_name(hub, folder):
    push(folder, "someone/lora", card=False)
    other = adapter()
    other = replace(other, updates={m: replace(f, A=f.A * 2) for m, f in other.factors.items()})
    other.save(folder)
    push(folder, "someone/lora", revision="twice/it", card=False)
    assert same(lk.Adapter.load("someone/lora@twice%2Fit"), other)
    assert same(lk.Adapter.load("someone/lora"), adapter())


def test_private_creates_a_private_repository_and_refuses_a_public_one(hub, folder, monkeypatch):
    push(folder, "someone/secret", private=True)
    assert hub.repositories["someone/secret"].private
    push(folder, "someone/secret", private=True)
    hub.add("someone/open", {"a": b""})
    with pytest.raises(LorakitError, match=r"someone/open exists and is public: --private is for new repositories"):
        push(folder, "someone/open", private=True)
    assert list(hub.files("someone/open")) == ["a"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match="or it is private"):
        lk.Adapter.load("someone/secret")


def test_a_damaged_adapter_is_not_uploaded(hub, folder, tmp_path):
    tensors = load_file(folder / "adapter_model.safetensors")
    bad = next(iter(tensors))
    tensors[bad][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"nothing was uploaded: .*not finite"):
        push(folder, "someone/lora")
    (folder / "adapter_model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"{}")
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        push(folder, "someone/lora")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickled tensors are not uploaded.*lorakit convert"):
        push(folder, "someone/lora")
    formats.save(adapter(), tmp_path / "lora.pt", "loralib")
    with pytest.raises(AdapterError, match="is a pickle, which can run code where it is loaded"):
        push(tmp_path / "lora.pt", "someone/lora", alpha=8.0)
    assert hub.log == []


@pytest.mark.parametrize(
    "notes",
    [
        3,
        ["x"],
        {"a": 3},
        {"lorakit": "[" * 100_000},
        {"lorakit": "{" * 9},
        {"lorakit": '{"a":' * 900 + "1" + "}" * 900},
    ],
)
def test_a_strange_header_is_an_error_or_uploaded_unchanged(hub, folder, notes):
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]) | {"__metadata__": notes}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    try:
        push(folder, "someone/lora")
    except AdapterError as error:
        assert str(folder) in str(error)  # noqa: PT017 (either is right)
        assert hub.log == []
    else:
        assert hub.files("someone/lora")[file.name] == file.read_bytes()


def test_a_single_file_is_uploaded_unchanged(hub, tmp_path):
    file = formats.save(adapter(), tmp_path / "my lora.safetensors", "loralib")
    (tmp_path / "README.md").write_text("of something else")
    done = push(file, "someone/lora", alpha=8.0)
    assert sorted(done.files) == ["README.md", "my lora.safetensors"]
    assert hub.files("someone/lora")["my lora.safetensors"] == file.read_bytes()
    assert b"of something else" not in hub.files("someone/lora")["README.md"]
    assert same(lk.Adapter.load("someone/lora/my lora.safetensors", alpha=8.0), adapter())


def test_a_local_card_is_uploaded_and_without_one_the_repositorys_is_kept(hub, folder):
    hub.add("someone/lora", {"README.md": b"their own words"})
    assert push(folder, "someone/lora").card == "as it is there"
    assert hub.files("someone/lora")["README.md"] == b"their own words"
    made = card_of(folder, license="mit")
    write(made.text, made.path)
    done = push(folder, "someone/lora")
    assert done.card == "as it is here"
    page = hub.files("someone/lora")["README.md"].decode()
    assert "license: mit" in page
    assert "OWNER/NAME" not in page
    (folder / "README.md").write_text("by hand, OWNER/NAME")
    push(folder, "someone/lora")
    assert hub.files("someone/lora")["README.md"] == b"by hand, OWNER/NAME"
    with pytest.raises(ConfigError, match="--license does not change it"):
        push(folder, "someone/lora", license="mit")


def test_options_without_effect_on_an_existing_card_are_reported(hub, folder):
    # the new card has them
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3", license="mit").not_on_card == []
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3", license="mit").not_on_card == [
        "--license mit",
        "--base-model Qwen/Qwen3",
    ]
    (folder / "README.md").write_text("---\nbase_model: Qwen/Qwen3-0.6B\n---\n")
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3").not_on_card == ["--base-model Qwen/Qwen3"]
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3-0.6B").not_on_card == []
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3", license="mit", card=False).not_on_card == [
        "--license mit"
    ]


@pytest.mark.parametrize("name", ["README.md", "lorakit.json"])
def test_a_link_out_of_the_folder_is_not_followed(hub, folder, tmp_path, name):
    secret = tmp_path / "secret.json"
    secret.write_text('{"token": "secret"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(
        AdapterError, match=rf"{name} is a link that leads out of its folder, to {secret}\n  replace the link"
    ):
        push(folder, "someone/lora")
    assert hub.repositories == {}
    (folder / name).unlink()
    (folder / "inside.md").write_text("{}")
    (folder / name).symlink_to("inside.md")
    push(folder, "someone/lora")
    assert hub.files("someone/lora")[name] == b"{}"


def test_the_links_of_the_hubs_cache_are_followed_and_none_out_of_it(hub, folder, tmp_path):
    write(card_of(folder, repository="someone/lora").text, folder / "README.md")
    push(folder, "someone/lora")
    from huggingface_hub import snapshot_download

    cached = snapshot_download("someone/lora", endpoint=hub.url)
    assert push(cached, "someone/copy").card == "as it is here"
    assert hub.files("someone/copy")["README.md"] == (folder / "README.md").read_bytes()
    (tmp_path / "secret").write_text("secret")
    page = next(tmp_path.glob("hub-cache/models--someone--lora/snapshots/*/README.md"))
    page.unlink()
    page.symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="leads out of its folder"):
        push(cached, "someone/copy")


def test_a_gated_repository_is_not_taken_for_a_missing_one(hub, folder):
    hub.add("someone/gated", {"a": b"x"}, gated=True, granted=False)
    with pytest.raises(
        LorakitError,
        match=r"nothing was uploaded to someone/gated: someone/gated is gated: its owner grants access\n  ask",
    ):
        push(folder, "someone/gated")
    assert not any("create" in line for line in hub.log)


def test_refusals_have_a_fix_and_upload_nothing(hub, folder, monkeypatch):
    with pytest.raises(LorakitError, match=r"the token may not write to other/lora: You don't have the rights"):
        push(folder, "other/lora")
    hub.fail["/api/repos/create"] = 500
    with pytest.raises(
        LorakitError, match=r"the upload to someone/lora failed: it answers 500, an error on the hub's side"
    ):
        push(folder, "someone/lora")
    del hub.fail["/api/repos/create"]
    hub.add("someone/taken", {})
    hub.fail["/api/models/someone/taken/commit"] = 409
    with pytest.raises(LorakitError, match="changed by someone else at the same time"):
        push(folder, "someone/taken")
    assert hub.files("someone/taken") == {}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(LorakitError, match=r"the token was refused\n  log in with `hf auth login`.*of kind write"):
        push(folder, "someone/lora")
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.log)
    with pytest.raises(LorakitError, match=r"there is no token, and the hub needs one for uploads\n  log in"):
        push(folder, "someone/lora")
    assert len(hub.log) == asked
    assert "someone/lora" not in hub.repositories


@pytest.mark.parametrize(
    "name",
    ["lora", "a/b/c", "some one/lora", "someone/../x", "someone/", "someone/a--b", "", "https://huggingface.co/a/b"],
)
def test_an_invalid_repository_name_is_a_config_error(folder, name):
    with pytest.raises(ConfigError, match="is not a repository's name\n  expected OWNER/NAME"):
        push(folder, name)


def test_an_unreachable_hub_fails_in_seconds(folder, monkeypatch, tmp_path):
    hub_stub.settings(monkeypatch, tmp_path, "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(LorakitError, match=r"nothing was uploaded to someone/lora: it cannot be reached"):
        push(folder, "someone/lora")
    assert time.monotonic() - began < 5


def test_the_token_is_sent_to_the_hub_but_not_to_its_storage(hub, folder):
    push(folder, "someone/lora")  # the stub's storage refuses it
    assert any(line.startswith("PUT /lfs/") for line in hub.log)
    assert not any(hub_stub.TOKEN.encode() in body for _, body in hub.bodies)


def test_an_adapter_from_the_hub_can_be_pushed_to_another_repository(hub, folder, tmp_path):
    push(folder, "someone/lora")
    shutil.rmtree(folder)
    assert push("someone/lora", "someone/copy").created
    assert same(lk.Adapter.load("someone/copy"), adapter())
