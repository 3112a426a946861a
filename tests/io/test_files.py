"""Damaged, hostile and mislabelled files raise an AdapterError that says what and where."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.errors import AdapterError, LorakitError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Q = "base_model.model.lin0"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound adapter of rank 2 on lin0 and lin1."""
    model = tiny.randomise_factors(lk.attach(tiny.mlp(), lk.LoraConfig(rank=2, targets=["lin0", "lin1"])))
    return lk.capture(model).save(tmp_path / "adapter")


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors; `__` in a name stands for a dot."""
    now = load_file(folder / WEIGHTS)
    for key, value in tensors.items():
        name = f"base_model.model.{key.replace('__', '.')}"
        now.pop(name, None)
        if value is not None:
            now[name] = value
    save_file(now, folder / WEIGHTS, {"format": "pt"})


def configure(folder: Path, **values) -> None:
    config = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lin0__lora_A__weight": None}, "'lin0' has a lora_B and no lora_A"),
        ({"lin0__lora_B__weight": None}, "'lin0' has a lora_A and no lora_B"),
        ({"lin0__lora_A__default__weight": torch.zeros(2, 10)}, "a second A for 'lin0'"),
        ({"lin0__lora_A__weight": torch.zeros(3, 10)}, r"A \[3, 10\]; its config says rank 2"),
        ({"lin0__lora_A__weight": torch.zeros(2)}, r"A \[2\]; its config says rank 2"),
        ({"lin0__lora_B__weight": torch.zeros(20, 3)}, "expected the same"),
        ({"lin0__lora_B__weight": torch.zeros(20, 0)}, "none of them empty"),
        (
            {"lin0__lora_A__weight": torch.full((2, 10), float("nan"))},
            "factors of 'lin0': A holds 20 values that are not finite",
        ),
        (
            {"lin0__lora_B__weight": torch.full((20, 2), float("inf"))},
            "factors of 'lin0': B holds 40 values that are not finite",
        ),
        ({"lin0__lora_A__weight": torch.zeros(2, 10, dtype=torch.int64)}, "expected a floating-point type"),
        (
            {"lin0__lora_magnitude_vector": torch.zeros(20)},
            "is a DoRA's magnitude, and adapter_config.json does not say use_dora",
        ),
        ({"lin0__lora_B__bias": torch.zeros(20)}, "a bias on B is not supported"),
        ({"lin0__lora_E": torch.zeros(2, 1)}, "AdaLoRA is not supported"),
        ({"emb__token_adapter__trainable_tokens_delta": torch.zeros(2, 4)}, "does not name their indices"),
        ({"lin0__lora_C__weight": torch.zeros(2, 4)}, "is not one that LoRA has"),
        (
            {"head__weight": torch.full((4, 12), float("nan"))},
            "saved weight 'head.weight' holds values that are not finite",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        lk.Adapter.load(folder)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "says use_dora: true, and 'lin0' has no lora_magnitude_vector"),
        ({"lora_bias": True}, "a bias on B is not supported"),
        ({"target_parameters": ["experts.w"]}, "target_parameters names 'experts.w', and no key has its factors"),
        ({"target_parameters": "experts.w"}, "target_parameters is 'experts.w'; expected a list"),
        ({"trainable_token_indices": [1, 2]}, "their rows are missing"),
        ({"layer_replication": [[0, 1]]}, "layer replication"),
        ({"r": 10**9}, r"adapter_config.json: LoraConfig.rank: .* \(got 1000000000\)"),
        ({"r": -1}, "adapter_config.json: LoraConfig.rank"),
        ({"r": "all"}, "adapter_config.json: LoraConfig.rank"),
        ({"lora_alpha": -4}, "adapter_config.json: LoraConfig.alpha"),
        ({"lora_alpha": float("nan")}, "adapter_config.json: LoraConfig.alpha"),
        ({"rank_pattern": {"(": 3}}, "adapter_config.json: LoraConfig.rank_pattern"),
        ({"bias": "some"}, "adapter_config.json: LoraConfig.bias"),
        ({"lora_dropout": "x"}, "adapter_config.json: LoraConfig.dropout"),
    ],
)
def test_a_wrong_config_is_refused_and_the_file_named(folder, values, message):
    configure(folder, **values)
    with pytest.raises(AdapterError, match=message):
        lk.Adapter.load(folder)


def test_unknown_settings_are_ignored(folder):
    configure(folder, peft_version="9.9", something_new={"a": 1}, eva_config=None, loftq_config={})
    assert lk.Adapter.load(folder).rank == 2


BROKEN = {
    "cut": ("{", "line 1, column"),
    "list": ("[1]", "holds a list; expected a JSON object"),
    "deep": ("[" * 100_000, "nested too deeply|column"),
    "bytes": ("\udcff", "cannot be read"),
}


@pytest.mark.parametrize("name", [CONFIG, "lorakit.json"])
@pytest.mark.parametrize("text, message", BROKEN.values(), ids=BROKEN)
def test_broken_json_is_an_error_with_line_and_column(folder, name, text, message):
    (folder / name).write_bytes(text.encode("utf8", "surrogateescape"))
    with pytest.raises(AdapterError, match=message) as caught:
        lk.Adapter.load(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "packed", [5, {"lin0": 5}, {"lin0": [False]}, {"lin0": "yes"}, {"lin0": [True, False, True]}], ids=str
)
def test_wrong_packed_entries_in_lorakit_json_are_refused(folder, packed):
    (folder / "lorakit.json").write_text(json.dumps({"packed": packed}))
    with pytest.raises(AdapterError, match="packed"):
        lk.Adapter.load(folder)


GARBLED = [
    5,
    "x",
    {"samples": 3},
    {"parameters": None},
    {"samples": {"lin0.weight": ["a"]}},
    {"parameters": 3, "samples": {"lin0.weight": {}}},
]


@pytest.mark.parametrize("found", GARBLED, ids=str)
def test_a_garbled_fingerprint_is_a_mismatch_not_a_crash(folder, found):
    (folder / "lorakit.json").write_text(json.dumps({"fingerprint": found}))
    with pytest.raises(AdapterError, match=r"another base:\n  the adapter's fingerprint of its base is damaged"):
        lk.attach(tiny.mlp(), lk.Adapter.load(folder))
    lk.attach(tiny.mlp(), lk.Adapter.load(folder), force=True)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 400, -1])
def test_a_truncated_safetensors_is_refused(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is not a readable safetensors file"):
        lk.Adapter.load(folder)


def header(folder: Path, value: dict, length: int | None = None, data: bytes = b"\0" * 64) -> None:
    text = json.dumps(value).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_small_file_that_claims_gigabytes_allocates_no_memory(folder):
    before = peak()
    big = 10 * 2**30
    claims = [
        {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [2, big // 8], "data_offsets": [0, big]}},
        {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [2, big // 8], "data_offsets": [0, 64]}},
        {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}},
        {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
    ]
    for claim in claims:
        header(folder, claim)
        with pytest.raises(AdapterError):
            lk.Adapter.load(folder)
    header(folder, {}, length=2**62)
    with pytest.raises(AdapterError):
        lk.Adapter.load(folder)
    assert peak() - before < 200 * 1024, "kilobytes"


class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["LORAKIT_TEST_BOMB"],)


def use_pickle(folder: Path) -> Path:
    (folder / WEIGHTS).unlink()
    return folder / PICKLE


def test_code_in_a_pickle_is_refused_and_never_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_TEST_BOMB", str(tmp_path / "exploded"))
    path = use_pickle(folder)
    for write in (lambda: torch.save({"a": Bomb()}, path), lambda: path.write_bytes(pickle.dumps({"a": Bomb()}))):
        write()
        with pytest.raises(
            AdapterError, match=r"never runs code from an adapter; have its author save it as safetensors"
        ):
            lk.Adapter.load(folder)
        (tmp_path / "lora.pt").write_bytes(path.read_bytes())
        with pytest.raises(AdapterError, match="never runs code"):
            lk.Adapter.load(tmp_path / "lora.pt", alpha=4)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists(), "the bomb does go off when unpickled"


@pytest.mark.parametrize(
    "value, message",
    [
        ([1, 2], "holds a list; expected a state dict"),
        ({"a": 1}, "expected a state dict of named tensors"),
        ({1: torch.zeros(2)}, "expected a state dict of named tensors"),
        ({"a": {"b": torch.zeros(2)}}, "expected a state dict of named tensors"),
        (
            {f"{Q}.lora_A.weight": torch.zeros(1, 1).expand(2, 2**33)},
            "not a plain tensor whose elements are all in the file",
        ),
        ({f"{Q}.lora_A.weight": torch.zeros(1, 1).expand(2**20, 2**20)}, "no adapter is that large"),
        ({f"{Q}.lora_A.weight": torch.empty(2, 2**30, device="meta")}, "not a plain tensor"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 10).to_sparse()}, "not a plain tensor"),
    ],
    ids=["list", "numbers", "unnamed", "nested", "expanded", "huge", "meta", "sparse"],
)
def test_a_pickle_must_be_a_state_dict_of_plain_tensors(folder, value, message):
    torch.save(value, use_pickle(folder))
    with pytest.raises(AdapterError, match=message):
        lk.Adapter.load(folder)


NOISE = bytes(range(1, 9)) + b"{" + bytes(range(255, 0, -1))  # the 9th byte is where a safetensors file has its brace


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "compressed"])
def test_a_damaged_pickle_is_refused(folder, damage):
    path = use_pickle(folder)
    torch.save({f"{Q}.lora_A.weight": torch.zeros(64, 64), f"{Q}.lora_B.weight": torch.zeros(64, 64)}, path)
    data = path.read_bytes()
    if damage == "compressed":  # a zip bomb: torch itself never compresses
        with zipfile.ZipFile(path) as old:
            entries = {i.filename: old.read(i) for i in old.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in entries.items():
                new.writestr(name, content)
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "noise": NOISE}[damage])
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is not a state dict that can be read safely"):
        lk.Adapter.load(folder)


def test_a_sound_pickle_is_read_like_the_safetensors(folder):
    expected = lk.Adapter.load(folder)
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, use_pickle(folder))
    again = lk.Adapter.load(folder)
    assert all(torch.equal(again.factors[m].A, f.A) for m, f in expected.factors.items())


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(
        AdapterError, match=r"no adapter at '.*/adaptor': there is no such file or folder; did you mean 'adapter'\?"
    ):
        lk.Adapter.load(str(tmp_path / "adaptor"))
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        AdapterError, match=r"holds no weights: neither adapter_model.safetensors nor adapter_model.bin"
    ):
        lk.Adapter.load(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterError, match=r"the folder has no adapter_config\.json"):
        lk.Adapter.load(folder)
    with pytest.raises(AdapterError, match="unknown adapter format 'peftt'"):
        lk.Adapter.load(folder, format="peftt")


def test_an_adapter_loads_from_its_folder_or_either_file_in_it(folder):
    for path in (folder, str(folder), folder / CONFIG, folder / WEIGHTS):
        assert lk.Adapter.load(path).rank == 2


def test_an_empty_adapter_is_refused(folder):
    save_file({}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="the adapter is empty"):
        lk.Adapter.load(folder)


def test_keys_without_pefts_prefix_are_read(folder):
    now = {k.removeprefix("base_model.model."): v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(now, folder / WEIGHTS)
    assert set(lk.Adapter.load(folder).factors) == {"lin0", "lin1"}


def test_a_malformed_adapter_is_not_written(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    bad = lk.Adapter(
        lk.LoraConfig(rank=2), {"lin0": lk.Factors(torch.full((2, 10), float("nan")), torch.zeros(20, 2), 4.0)}
    )
    with pytest.raises(LorakitError, match="not finite"):
        bad.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_folder_with_one_adapter_inside_loads_it(folder):
    assert lk.Adapter.load(folder.parent).rank == 2


def test_alpha_for_a_peft_folder_is_an_error(folder):
    with pytest.raises(AdapterError, match="which holds its alpha"):
        lk.Adapter.load(folder, alpha=4)
