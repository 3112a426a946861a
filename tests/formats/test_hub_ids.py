"""Reading by hub id, from a stub of the hub: which names mean what, which files are fetched, and what is said when it
fails.
"""

from __future__ import annotations

import shutil
import time

import hub_stub
import pytest
import torch

import lorakit as lk
from lorakit import formats
from lorakit.errors import AdapterError
from lorakit.formats.hub import MOST_BYTES, HubName, choose, hub_name


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stub.serve(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture(scope="module")
def peft(tmp_path_factory):
    """The files of a small PEFT folder."""
    config = lk.LoraConfig(rank=4, alpha=6.0, targets=["q"])
    adapter = lk.Adapter(config, {"layers.0.q": factors()}, metadata={"note": "kept"})
    return files_of(adapter.save(tmp_path_factory.mktemp("peft") / "a"))


def factors(alpha=6.0):
    made = torch.Generator().manual_seed(0)
    return lk.Factors(torch.randn(4, 15, generator=made), torch.randn(12, 4, generator=made), alpha)


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def same(ours, theirs):
    return ours.factors.keys() == theirs.factors.keys() and all(
        torch.equal(f.A, theirs.factors[m].A) and torch.equal(f.B, theirs.factors[m].B) for m, f in ours.factors.items()
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("someone/adapter", HubName("someone/adapter")),
        ("some.one/a_b-c.d", HubName("some.one/a_b-c.d")),
        ("someone/adapter@v1", HubName("someone/adapter", "v1")),
        ("someone/adapter@feature%2Fx", HubName("someone/adapter", "feature/x")),
        ("someone/adapter@refs/pr/3", HubName("someone/adapter", "refs/pr/3")),
        ("someone/adapter/a/b.safetensors", HubName("someone/adapter", None, "a/b.safetensors")),
        ("someone/adapter@v1/a b.gguf", HubName("someone/adapter", "v1", "a b.gguf")),
        ("someone/adapter@v1/folder/", HubName("someone/adapter", "v1", "folder")),
        ("hf://someone/adapter", HubName("someone/adapter")),
        ("hf://someone/adapter/folder", HubName("someone/adapter", None, "folder")),
        ("someone/adapter/folder", None),
        ("someone/weights.safetensors", None),
        ("./someone/adapter", None),
        ("/someone/adapter", None),
        ("~/adapter", None),
        ("../a/b", None),
        ("alone", None),
        ("", None),
        ("someone/", None),
        ("C:\\someone\\adapter", None),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_local_path(text, expected):
    assert hub_name(text) == expected


def test_only_a_name_like_a_hub_id_is_looked_for_on_the_hub(hub):
    for path in ("./here/it", "/nowhere/it", "a/b/c", "alone", "some/adapter_model.safetensors"):
        with pytest.raises(AdapterError, match="there is no such file or folder"):
            lk.Adapter.load(path)
    assert hub.log == []


def test_a_file_below_a_folder_that_is_here_is_a_local_path(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_name("runs/first/lora.safetensors") is None
    assert hub_name("hf://runs/first/lora.safetensors") == HubName("runs/first", None, "lora.safetensors")
    with pytest.raises(AdapterError, match="there is no such file or folder"):
        lk.Adapter.load("runs/first/lora.safetensors")


def test_only_the_adapters_files_of_a_peft_repository_are_fetched(hub, peft, tmp_path):
    junk = {
        "README.md": b"x",
        "model.safetensors": b"x" * 99,
        "optimizer.pt": b"x",
        "merged-Q4.gguf": b"x",
        "data.json": b"{}",
        "checkpoint-5/adapter_model.safetensors": b"x",
    }
    hub.add("someone/adapter", peft | junk)
    found = lk.Adapter.load("someone/adapter")
    (tmp_path / "local").mkdir()
    for name, content in peft.items():
        (tmp_path / "local" / name).write_bytes(content)
    assert same(found, lk.Adapter.load(tmp_path / "local"))
    assert found.metadata["note"] == "kept"
    assert hub.fetched() == ["adapter_config.json", "adapter_model.safetensors", "lorakit.json"]
    assert formats.format_of("someone/adapter") == "peft"


def test_virtual_tokens_and_their_encoder_are_fetched_with_the_adapter():
    inner = [f"virtual_tokens/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")]
    own = ["adapter_config.json", "adapter_model.safetensors", "lorakit.json", "prompt_encoder.safetensors", *inner]
    others = ["virtual_tokens/notes.txt", "checkpoint-5/prompt_encoder.safetensors"]
    for folder in ("", "last/"):
        files = {folder + name: 5 for name in (*own, *others)}
        chosen, opened = choose(files, HubName("someone/adapter", None, folder.rstrip("/") or None))
        assert sorted(chosen) == [folder + name for name in own]
        assert opened == folder


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, peft):
    old = hub.add("someone/adapter", {"README.md": b"nothing yet"})
    hub.add("someone/adapter", peft, branch="feature/x")
    commit = hub.repositories["someone/adapter"].refs["feature/x"]
    hub.repositories["someone/adapter"].refs["v1"] = commit
    for name in ("someone/adapter@v1", "someone/adapter@feature%2Fx", f"someone/adapter@{commit}"):
        assert lk.Adapter.load(name).rank == 4
    assert lk.Adapter.load("someone/adapter", revision="v1").rank == 4
    with pytest.raises(AdapterError, match=r"someone/adapter holds no adapter: its files are README\.md"):
        lk.Adapter.load(f"someone/adapter@{old}")
    with pytest.raises(AdapterError, match=r"has no revision 'v2'\n.*branch, a tag or a commit"):
        lk.Adapter.load("someone/adapter@v2")
    with pytest.raises(AdapterError, match="says a revision, and revision 'v2' was given too"):
        lk.Adapter.load("someone/adapter@v1", revision="v2")


def test_a_file_or_folder_inside_is_named(hub, peft, tmp_path):
    adapter = lk.Adapter(lk.LoraConfig(rank=4, alpha=6.0, targets=["q"]), {"layers.0.q": factors(alpha=4.0)})
    file = formats.save(adapter, tmp_path / "lora.safetensors", "loralib").read_bytes()
    hub.add(
        "someone/many",
        {"a/one [x].safetensors": file, "a/two.safetensors": file, **{f"p/{n}": c for n, c in peft.items()}},
    )
    assert same(lk.Adapter.load("someone/many/a/one [x].safetensors", alpha=4.0), adapter)
    assert hub.fetched() == ["a/one [x].safetensors"]
    expected = lk.Adapter.load("hf://someone/many/p")
    assert expected.rank == 4
    assert same(lk.Adapter.load("someone/many/p/adapter_model.safetensors"), expected)
    with pytest.raises(
        AdapterError, match=r"no file or folder 'a/tow\.safetensors'; did you mean 'a/two\.safetensors'\?"
    ):
        lk.Adapter.load("someone/many/a/tow.safetensors")
    with pytest.raises(
        AdapterError, match=r"several files.*\n  name one of them:\n    someone/many/a/one \[x\]\.safetensors\n"
    ):
        lk.Adapter.load("hf://someone/many/a")
    with pytest.raises(AdapterError, match=r"holds no adapter.*\n.*hf://someone/many/p"):
        lk.Adapter.load("someone/many")


NAME = HubName("someone/x")


@pytest.mark.parametrize(
    "files, wanted",
    [
        (
            ["style.safetensors", "README.md", "config.json", "model.safetensors", "model-00001-of-00002.safetensors"],
            "style.safetensors",
        ),
        (
            ["pytorch_lora_weights.safetensors", "other.safetensors", "diffusion_pytorch_model.safetensors"],
            "pytorch_lora_weights.safetensors",
        ),
        (["model-lora.safetensors", "model.fp16.safetensors"], "model-lora.safetensors"),
        (["lora.gguf", "training_args.bin"], "lora.gguf"),
        (["embeds.pt", "optimizer.pt", "style.safetensors"], "style.safetensors"),
        (["lora_weight.pt", "scheduler.pt", "rng_state_0.pth"], "lora_weight.pt"),
    ],
)
def test_the_one_file_that_can_be_an_adapter_is_found_among_others(files, wanted):
    assert choose(dict.fromkeys(files, 100), NAME) == ([wanted], wanted)


@pytest.mark.parametrize(
    "files, told",
    [
        ({"a.safetensors": 1, "b.gguf": 1}, r"several files"),
        ({"config.json": 1, "model.safetensors": 1}, r"holds no adapter \(it holds a model: config\.json\)"),
        ({"v1-5.ckpt": 1}, r"holds no adapter: its files are v1-5\.ckpt"),
        (
            {"llama-Q4.gguf": MOST_BYTES + 1},
            r"rather a model than an adapter \(.* bytes\), and was not fetched\n.*someone/x/llama-Q4\.gguf",
        ),
        ({"adapter_config.json": 1, "model.safetensors": 9}, r"has an adapter_config\.json and no weights"),
        ({}, "its files are none"),
    ],
)
def test_what_cannot_be_chosen_is_said(files, told):
    with pytest.raises(AdapterError, match=told):
        choose(files, NAME)


def test_what_was_fetched_is_used_without_a_connection(hub, peft, monkeypatch):
    from huggingface_hub import constants

    hub.add("someone/adapter", peft | {"README.md": b"x"})
    expected = lk.Adapter.load("someone/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    assert same(lk.Adapter.load("someone/adapter"), expected)
    assert len(hub.log) == asked
    with pytest.raises(AdapterError, match=r"the hub did not give it: HF_HUB_OFFLINE is set"):
        lk.Adapter.load("someone/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert same(lk.Adapter.load("someone/adapter"), expected)


def test_a_second_reading_asks_once_and_sees_what_is_new(hub, peft):
    hub.add("someone/adapter", peft)
    lk.Adapter.load("someone/adapter")
    asked = len(hub.log)
    assert lk.Adapter.load("someone/adapter").metadata["note"] == "kept"
    assert hub.log[asked:] == ["GET /api/models/someone/adapter"]
    hub.add("someone/adapter", peft | {"lorakit.json": b'{"note": "new"}'})
    assert lk.Adapter.load("someone/adapter").metadata["note"] == "new"


def test_a_closed_door_is_told_in_seconds(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(
        AdapterError, match=r"no such file or folder here\n.*it cannot be reached \(.*\)\n  check the network"
    ):
        lk.Adapter.load("someone/adapter")
    assert time.monotonic() - began < 5


def test_refusals_say_what_to_do(hub, peft, monkeypatch):
    hub.add("someone/secret", peft, private=True)
    hub.add("someone/gated", peft, gated=True)
    assert lk.Adapter.load("someone/secret").rank == 4
    with pytest.raises(
        AdapterError, match=r"no repository someone/none, or it is private\n.*your token has no access to it"
    ):
        lk.Adapter.load("someone/none")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AdapterError, match=r"the token was refused\n  log in with `hf auth login`, or set HF_TOKEN"):
        lk.Adapter.load("someone/secret")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match=r"or it is private\n.*log in with `hf auth login`"):
        lk.Adapter.load("someone/secret")
    with pytest.raises(AdapterError, match=r"someone/gated is gated: its owner grants access"):
        lk.Adapter.load("someone/gated")
    for status, told in ((500, "it answers 500"), (429, "no more requests"), (403, "the token may not read")):
        hub.fail["/api/models/"] = status
        with pytest.raises(AdapterError, match=told):
            lk.Adapter.load("someone/gated")


def test_a_hostile_listing_writes_nothing_outside_the_cache(hub, peft, tmp_path):
    hub.add("someone/evil", {"../../evil.safetensors": b"x", "/abs.safetensors": b"x"})
    with pytest.raises(AdapterError):
        lk.Adapter.load("someone/evil")
    assert not list(tmp_path.rglob("*evil.safetensors"))
    shutil.rmtree(tmp_path / "hub-cache", ignore_errors=True)
