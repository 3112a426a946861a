"""Uploading an adapter to a stub of the hub: what goes, what never goes, and what is said when the hub refuses."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace

import hub_stub
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit import formats
from lorakit.errors import AdapterError, ConfigError, LorakitError
from lorakit.share import card_of, write
from lorakit.share.push import push
from lorakit.share.upload import mended

NAMES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lorakit.json"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stub.serve(monkeypatch, tmp_path) as served:
        yield served


def adapter(base="Qwen/Qwen3-0.6B", **metadata):
    made = torch.Generator().manual_seed(0)
    factors = {
        f"model.layers.{i}.q_proj": lk.Factors(torch.randn(4, 15, generator=made), torch.randn(12, 4, generator=made), 8.0)
        for i in range(2)
    }
    config = lk.LoraConfig(rank=4, alpha=8.0, targets=["q_proj"], base=base, task="CAUSAL_LM")
    return lk.Adapter(config, factors, metadata=metadata)


@pytest.fixture
def folder(tmp_path):
    return adapter().save(tmp_path / "adapter")


def same(ours, theirs):
    return ours.factors.keys() == theirs.factors.keys() and all(
        torch.equal(f.A, theirs.factors[m].A) and torch.equal(f.B, theirs.factors[m].B) for m, f in ours.factors.items()
    )


def test_what_is_pushed_is_loaded_again_by_its_hub_id_to_the_bit(hub, folder):
    done = push(folder, "someone/lora")
    assert (done.created, done.card, done.url) == (True, "written", f"{hub.url}/someone/lora")
    there = hub.files("someone/lora")
    assert sorted(there) == [".gitattributes", *NAMES]
    assert all(there[name] == (folder / name).read_bytes() for name in NAMES[1:])
    assert done.files == {name: len(there[name]) for name in NAMES}
    assert same(lk.Adapter.load("someone/lora"), lk.Adapter.load(folder))
    assert b'lk.Adapter.load("someone/lora")' in there["README.md"]


def test_it_is_one_commit_and_the_tensors_go_through_lfs(hub, folder):
    push(folder, "someone/lora", message="the first")
    commits = [json.loads(line) for path, body in hub.bodies if "/commit/" in path for line in body.splitlines()]
    assert commits[0] == {"key": "header", "value": {"summary": "the first", "description": ""}}
    assert {line["value"]["path"]: line["key"] for line in commits[1:]} == {
        "README.md": "file", "adapter_config.json": "file", "lorakit.json": "file", "adapter_model.safetensors": "lfsFile"
    }  # fmt: skip
    assert list(hub.large.values()) == [(folder / "adapter_model.safetensors").read_bytes()]
    assert len(hub.repositories["someone/lora"].commits) == 2  # the repository's first, and this
    again = push(folder, "someone/lora", card=False)
    assert (again.created, again.changed) == (False, False)
    assert len(hub.repositories["someone/lora"].commits) == 2


def test_only_the_adapters_own_files_go(hub, folder):
    for name in (".env", "optimizer.safetensors", "rows.jsonl", "adapter_model.bin", "config.json.bak", ".adapter_config.json.x.tmp"):
        (folder / name).write_text("HF_TOKEN=secret")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "adapter_model.safetensors").write_text("x")
    assert sorted(push(folder, "someone/lora").files) == NAMES
    assert sorted(hub.files("someone/lora")) == [".gitattributes", *NAMES]
    assert not any(b"secret" in body for _, body in hub.bodies)


def test_a_dry_run_asks_nothing_and_needs_no_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    heard = []
    done = push(folder, "someone/lora", dry_run=True, tell=heard.append)
    assert heard == [done]
    assert sorted(done.files) == NAMES
    assert hub.log == []
    assert not (folder / "README.md").exists()


def test_a_branch_is_made_and_read_by_its_name(hub, folder):
    push(folder, "someone/lora", card=False)
    other = adapter()
    other = replace(other, factors={m: replace(f, A=f.A * 2) for m, f in other.factors.items()})
    other.save(folder)
    push(folder, "someone/lora", revision="twice/it", card=False)
    assert same(lk.Adapter.load("someone/lora@twice%2Fit"), other)
    assert same(lk.Adapter.load("someone/lora"), adapter())


def test_a_private_repository_is_made_private_and_a_public_one_is_never_taken_for_it(hub, folder, monkeypatch):
    push(folder, "someone/secret", private=True)
    assert hub.repositories["someone/secret"].private
    push(folder, "someone/secret", private=True)
    hub.add("someone/open", {"a": b""})
    with pytest.raises(LorakitError, match=r"someone/open exists and is public: --private is for a new repository"):
        push(folder, "someone/open", private=True)
    assert list(hub.files("someone/open")) == ["a"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match="or it is private"):
        lk.Adapter.load("someone/secret")


def test_an_adapter_that_is_not_sound_stays_here(hub, folder, tmp_path):
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
    with pytest.raises(AdapterError, match="is a pickle, which whoever downloads it would have to trust"):
        push(tmp_path / "lora.pt", "someone/lora", alpha=8.0)
    assert hub.log == []


@pytest.mark.parametrize(
    "notes", [3, ["x"], {"a": 3}, {"lorakit": "[" * 100_000}, {"lorakit": "{" * 9}, {"lorakit": '{"a":' * 900 + "1" + "}" * 900}]
)
def test_a_strange_header_is_an_error_or_goes_as_it_is(hub, folder, notes):
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


def test_a_single_file_goes_as_it_is(hub, tmp_path):
    file = formats.save(adapter(), tmp_path / "my lora.safetensors", "loralib")
    (tmp_path / "README.md").write_text("of something else")
    done = push(file, "someone/lora", alpha=8.0)
    assert sorted(done.files) == ["README.md", "my lora.safetensors"]
    assert hub.files("someone/lora")["my lora.safetensors"] == file.read_bytes()
    assert b"of something else" not in hub.files("someone/lora")["README.md"]
    assert same(lk.Adapter.load("someone/lora/my lora.safetensors", alpha=8.0), adapter())


def test_paths_of_this_machine_are_not_uploaded(hub, tmp_path):
    value = adapter(
        "/home/alice/models/llama", recipe={"model": "/home/alice/models/llama", "validation": "~/alice/rows.jsonl"}, note="1/2"
    )
    folder = value.save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = r"(?:.*\.)?\d+\.mlp\.q_proj|.*\.layers\.\d+\.q_proj"  # full of what looks like a path, and is none
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = push(folder, "someone/lora")
    assert any("adapter_config.json, base_model_name_or_path: a local path is cut to 'llama'" in line for line in done.mended)
    assert not any(b"alice" in body for _, body in hub.bodies)
    found = lk.Adapter.load("someone/lora")
    assert same(found, value)
    assert found.config.base == "llama"
    assert found.config.targets == config["target_modules"]
    assert found.metadata == {"recipe": {"model": "llama", "validation": "rows.jsonl"}, "note": "1/2"}
    assert json.loads((folder / "adapter_config.json").read_text()) == config, "what is here stays"
    push(folder, "someone/lora", base_model="meta/llama")
    assert lk.Adapter.load("someone/lora").config.base == "meta/llama"


@pytest.mark.parametrize(
    "base, uploaded",
    [
        ("../private/acme-secret-llama", "acme-secret-llama"),
        ("./llama", "llama"),
        ("clients/acme/llama", "llama"),
        ("clients/llama/", "llama"),  # a folder that is here
        ("models/llama", "llama"),  # nobody's on the hub
        ("..\\acme\\llama", "llama"),
        ("/home/alice/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0ab12", "Qwen/Qwen3-0.6B"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("https://example.org/a/b/llama", "https://example.org/a/b/llama"),
        ("..", ".."),
    ],
)
def test_a_base_that_is_no_hub_id_is_uploaded_by_its_last_name(hub, tmp_path, monkeypatch, base, uploaded):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients" / "llama").mkdir(parents=True)
    folder = adapter(base, recipe={"model": base}).save(tmp_path / "adapter")
    done = push(folder, "someone/lora", card=False)
    there = hub.files("someone/lora")
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == uploaded
    assert json.loads(there["lorakit.json"])["recipe"] == {"model": uploaded}
    assert [line.split(":")[0] for line in done.mended] == (
        []
        if base == uploaded
        else [
            "adapter_config.json, base_model_name_or_path",
            "adapter_model.safetensors, lorakit, recipe, model",
            "lorakit.json, recipe, model",
        ]
    )
    assert done.left == []
    assert same(lk.Adapter.load("someone/lora"), lk.Adapter.load(folder))


def test_every_local_path_is_cut_or_named_and_nothing_is_sent_unmentioned(hub, tmp_path):
    notes = {
        "argv": ["train", "--data=/home/bob/rows.jsonl", "/home/bob/out", "--lr=1e-4"],
        "about": "trained on /home/alice/x, see https://example.org/a/b",
        "also": "rows of ../acme/rows.jsonl",
        "sizes": {"/home/carol/rows.jsonl": 3},
        "validation": "private/acme/rows.jsonl",
        "link": "https://example.org/c/d",
    }
    folder = adapter(recipe=notes).save(tmp_path / "adapter")
    dry = push(folder, "someone/lora", dry_run=True)
    done = push(folder, "someone/lora")
    recipe = json.loads(hub.files("someone/lora")["lorakit.json"])["recipe"]
    assert recipe == notes | {"argv": ["train", "--data=rows.jsonl", "out", "--lr=1e-4"], "validation": "rows.jsonl"}
    copies = ("adapter_model.safetensors, lorakit", "lorakit.json")
    assert sorted(done.mended) == [
        f"{copy}, recipe, {told}"
        for copy in copies
        for told in (
            "argv[1]: a local path is cut to '--data=rows.jsonl'",
            "argv[2]: a local path is cut to 'out'",
            "validation: a local path is cut to 'rows.jsonl'",
        )
    ]
    assert sorted(done.left) == [
        f"{copy}, recipe, {told}"
        for copy in copies
        for told in (
            "about: holds a local path",
            "also: holds a local path",
            "sizes, /home/carol/rows.jsonl: the key holds a local path",
        )
    ]
    assert (dry.mended, dry.left) == (done.mended, done.left)
    assert done.to_dict()["left"] == done.left


def test_the_header_of_the_tensors_is_mended_and_their_bytes_stay(hub, folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors, file, {"lorakit": json.dumps({"recipe": {"data": "/home/alice/rows"}}), "note": "from /home/alice/x", "format": "pt"}
    )
    done = push(folder, "someone/lora")
    assert done.mended == ["adapter_model.safetensors, lorakit, recipe, data: a local path is cut to 'rows'"]
    assert done.left == ["adapter_model.safetensors, note: holds a local path"]
    there = hub.files("someone/lora")[file.name]
    size = int.from_bytes(there[:8], "little")
    assert json.loads(there[8 : 8 + size])["__metadata__"] == {
        "lorakit": '{"recipe": {"data": "rows"}}', "note": "from /home/alice/x", "format": "pt"
    }  # fmt: skip
    assert same(lk.Adapter.load("someone/lora"), lk.Adapter.load(folder))
    old = file.read_bytes()
    assert there[8 + size :] == old[8 + int.from_bytes(old[:8], "little") :]


def test_a_single_file_goes_as_it_is_and_its_paths_are_named(hub, tmp_path):
    file = formats.save(adapter(), tmp_path / "lora.safetensors", "loralib")
    save_file(load_file(file), file, {"base": "/home/alice/llama", "args": '["--data=/home/alice/x"]', "url": "https://example.org/a/b"})
    done = push(file, "someone/lora", alpha=8.0)
    assert sorted(done.left) == ["lora.safetensors, args[0]: holds a local path", "lora.safetensors, base: holds a local path"]
    assert done.mended == []
    assert hub.files("someone/lora")[file.name] == file.read_bytes()


def test_local_paths_in_a_ggufs_pairs_are_named(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "qwen2")
    writer.add_string("general.source.url", "https://example.org/a/b")
    writer.add_string("general.description", "from /home/alice/llama")
    writer.add_tensor("x", torch.ones(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = {"lora.gguf": tmp_path / "lora.gguf"}
    with ExitStack() as stack:
        found = mended(files, None, stack)
    assert (found.files, found.changed) == (files, [])
    assert found.left == ["lora.gguf, general.description: holds a local path"]


def test_the_card_that_is_here_goes_and_the_one_that_is_there_stays(hub, folder):
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
    with pytest.raises(ConfigError, match="a licence belongs into it"):
        push(folder, "someone/lora", license="mit")


def test_options_that_a_card_that_is_there_does_not_follow_are_named(hub, folder):
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3", license="mit").not_on_card == []  # written with them
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3", license="mit").not_on_card == ["--license mit", "--base-model Qwen/Qwen3"]
    (folder / "README.md").write_text("---\nbase_model: Qwen/Qwen3-0.6B\n---\n")
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3").not_on_card == ["--base-model Qwen/Qwen3"]
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3-0.6B").not_on_card == []
    assert push(folder, "someone/lora", base_model="Qwen/Qwen3", license="mit", card=False).not_on_card == ["--license mit"]


@pytest.mark.parametrize("name", ["README.md", "lorakit.json"])
def test_a_link_out_of_the_folder_is_not_followed(hub, folder, tmp_path, name):
    secret = tmp_path / "secret.json"
    secret.write_text('{"token": "secret"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(AdapterError, match=rf"{name} is a link that leads out of its folder, to {secret}\n  put a copy"):
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
        LorakitError, match=r"nothing was uploaded to someone/gated: someone/gated is gated: its owner grants access\n  ask"
    ):
        push(folder, "someone/gated")
    assert not any("create" in line for line in hub.log)


def test_refusals_say_what_to_do_and_leave_nothing_there(hub, folder, monkeypatch):
    with pytest.raises(LorakitError, match=r"the token may not write to other/lora: You don't have the rights"):
        push(folder, "other/lora")
    hub.fail["/api/repos/create"] = 500
    with pytest.raises(LorakitError, match=r"the upload to someone/lora failed: it answers 500, an error on the hub's side"):
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
    with pytest.raises(LorakitError, match=r"there is no token, and the hub takes uploads only with one\n  log in"):
        push(folder, "someone/lora")
    assert len(hub.log) == asked
    assert "someone/lora" not in hub.repositories


@pytest.mark.parametrize(
    "name", ["lora", "a/b/c", "some one/lora", "someone/../x", "someone/", "someone/a--b", "", "https://huggingface.co/a/b"]
)
def test_an_invalid_repository_name_is_a_wrong_call(folder, name):
    with pytest.raises(ConfigError, match="is no name of a repository\n  expected OWNER/NAME"):
        push(folder, name)


def test_a_closed_door_is_told_in_seconds(folder, monkeypatch, tmp_path):
    hub_stub.settings(monkeypatch, tmp_path, "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(LorakitError, match=r"nothing was uploaded to someone/lora: it cannot be reached"):
        push(folder, "someone/lora")
    assert time.monotonic() - began < 5


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, folder):
    push(folder, "someone/lora")  # the stub's storage refuses it
    assert any(line.startswith("PUT /lfs/") for line in hub.log)
    assert not any(hub_stub.TOKEN.encode() in body for _, body in hub.bodies)


def test_an_adapter_of_the_hub_may_be_pushed_on(hub, folder, tmp_path):
    push(folder, "someone/lora")
    shutil.rmtree(folder)
    assert push("someone/lora", "someone/copy").created
    assert same(lk.Adapter.load("someone/copy"), adapter())
