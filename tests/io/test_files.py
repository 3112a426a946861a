"""Files that are damaged, hostile or not what they claim: an AdapterError that says what and where, and no harm done."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.errors import AdapterError, LorakitError, WriteError
from lorakit.io.atomic import replacing, write_text
from lorakit.io.tensors import write_tensors

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
    "changes, said",
    [
        ({"lin0__lora_A__weight": None}, "'lin0' has a lora_B and no lora_A"),
        ({"lin0__lora_B__weight": None}, "'lin0' has a lora_A and no lora_B"),
        ({"lin0__lora_A__default__weight": torch.zeros(2, 10)}, "a second A for 'lin0'"),
        ({"lin0__lora_A__weight": torch.zeros(3, 10)}, r"A \[3, 10\]; its config says rank 2"),
        ({"lin0__lora_A__weight": torch.zeros(2)}, r"A \[2\]; its config says rank 2"),
        ({"lin0__lora_B__weight": torch.zeros(20, 3)}, "expected the same"),
        ({"lin0__lora_B__weight": torch.zeros(20, 0)}, "none of them empty"),
        ({"lin0__lora_A__weight": torch.full((2, 10), float("nan"))}, "factors of 'lin0': A holds 20 values that are not finite"),
        ({"lin0__lora_B__weight": torch.full((20, 2), float("inf"))}, "factors of 'lin0': B holds 40 values that are not finite"),
        ({"lin0__lora_A__weight": torch.zeros(2, 10, dtype=torch.int64)}, "expected a floating-point type"),
        ({"lin0__lora_magnitude_vector": torch.zeros(20)}, "is a DoRA's magnitude, and adapter_config.json does not say use_dora"),
        ({"lin0__lora_B__bias": torch.zeros(20)}, "a bias on B is not supported"),
        ({"lin0__lora_E": torch.zeros(2, 1)}, "AdaLoRA is not supported"),
        ({"emb__token_adapter__trainable_tokens_delta": torch.zeros(2, 4)}, "trained tokens is not supported"),
        ({"lin0__lora_C__weight": torch.zeros(2, 4)}, "is not one that LoRA has"),
        ({"head__weight": torch.full((4, 12), float("nan"))}, "saved weight 'head.weight' holds values that are not finite"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_refused_by_name(folder, changes, said):
    change(folder, **changes)
    with pytest.raises(AdapterError, match=said):
        lk.Adapter.load(folder)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "says use_dora: true, and 'lin0' has no lora_magnitude_vector"),
        ({"lora_bias": True}, "a bias on B is not supported"),
        ({"target_parameters": ["experts.w"]}, "MoE experts"),
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
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
)  # fmt: skip
def test_a_wrong_config_is_refused_and_the_file_named(folder, values, said):
    configure(folder, **values)
    with pytest.raises(AdapterError, match=said):
        lk.Adapter.load(folder)


def test_settings_that_lorakit_does_not_know_do_no_harm(folder):
    configure(folder, peft_version="9.9", something_new={"a": 1}, eva_config=None, loftq_config={})
    assert lk.Adapter.load(folder).rank == 2


BROKEN = {
    "cut": ("{", "line 1, column"),
    "list": ("[1]", "holds a list; expected a JSON object"),
    "deep": ("[" * 100_000, "nested too deeply|column"),
    "bytes": ("\udcff", "cannot be read"),
}


@pytest.mark.parametrize("name", [CONFIG, "lorakit.json"])
@pytest.mark.parametrize("text, said", BROKEN.values(), ids=BROKEN)
def test_broken_json_is_an_error_with_its_place(folder, name, text, said):
    (folder / name).write_bytes(text.encode("utf8", "surrogateescape"))
    with pytest.raises(AdapterError, match=said) as caught:
        lk.Adapter.load(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("packed", [5, {"lin0": 5}, {"lin0": [False]}, {"lin0": "yes"}, {"lin0": [True, False, True]}], ids=str)
def test_a_wrong_packing_in_our_own_file_is_refused(folder, packed):
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


def test_a_small_file_that_claims_gigabytes_takes_no_memory(folder):
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
        with pytest.raises(AdapterError, match=r"never runs code from an adapter; have its author save it as safetensors"):
            lk.Adapter.load(folder)
        (tmp_path / "lora.pt").write_bytes(path.read_bytes())
        with pytest.raises(AdapterError, match="never runs code"):
            lk.Adapter.load(tmp_path / "lora.pt", alpha=4)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists(), "the bomb does explode where it is let"


@pytest.mark.parametrize(
    "value, said",
    [
        ([1, 2], "holds a list; expected a state dict"),
        ({"a": 1}, "expected a state dict of named tensors"),
        ({1: torch.zeros(2)}, "expected a state dict of named tensors"),
        ({"a": {"b": torch.zeros(2)}}, "expected a state dict of named tensors"),
        ({f"{Q}.lora_A.weight": torch.zeros(1, 1).expand(2, 2**33)}, "not a plain tensor whose numbers are all in the file"),
        ({f"{Q}.lora_A.weight": torch.zeros(1, 1).expand(2**20, 2**20)}, "no adapter is that large"),
        ({f"{Q}.lora_A.weight": torch.empty(2, 2**30, device="meta")}, "not a plain tensor"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 10).to_sparse()}, "not a plain tensor"),
    ],
    ids=["list", "numbers", "unnamed", "nested", "expanded", "huge", "meta", "sparse"],
)
def test_a_pickle_that_is_no_state_dict_of_plain_tensors_is_refused(folder, value, said):
    torch.save(value, use_pickle(folder))
    with pytest.raises(AdapterError, match=said):
        lk.Adapter.load(folder)


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
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "noise": os.urandom(500)}[damage])
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is not a state dict that can be read safely"):
        lk.Adapter.load(folder)


def test_a_sound_pickle_is_read_like_the_safetensors(folder):
    expected = lk.Adapter.load(folder)
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, use_pickle(folder))
    again = lk.Adapter.load(folder)
    assert all(torch.equal(again.factors[m].A, f.A) for m, f in expected.factors.items())


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter at '.*/adaptor': there is no such file or folder; did you mean 'adapter'\?"):
        lk.Adapter.load(str(tmp_path / "adaptor"))
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"holds no weights: neither adapter_model.safetensors nor adapter_model.bin"):
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


# ------------------------------------------------------------------------------------- writing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with suppress(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_malformed_adapter_is_not_written(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    bad = lk.Adapter(lk.LoraConfig(rank=2), {"lin0": lk.Factors(torch.full((2, 10), float("nan")), torch.zeros(20, 2), 4.0)})
    with pytest.raises(LorakitError, match="not finite"):
        bad.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_the_same_tensors_make_the_same_bytes(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2, dtype=torch.bfloat16), "ü": torch.ones(1).expand(4)}
    metadata = {"format": "pt", "lorakit": json.dumps({"text": 'ü "quoted" \\ \n'}), "another": "x"}
    made = set()
    for i in range(6):
        write_tensors(tmp_path / f"{i}.safetensors", dict(sorted(tensors.items(), reverse=i % 2 == 0)), metadata)
        made.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(made) == 1
    assert {n: t.tolist() for n, t in load_file(tmp_path / "0.safetensors").items()} == {n: t.tolist() for n, t in tensors.items()}
    from safetensors import safe_open

    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_files_get_the_permissions_that_the_user_asks_for(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "x.txt", "a")
    finally:
        os.umask(old)
    assert (tmp_path / "x.txt").stat().st_mode & 0o777 == 0o640


def test_a_folder_around_one_adapter_means_that_one(folder):
    assert lk.Adapter.load(folder.parent).rank == 2


def test_alpha_for_a_peft_folder_is_an_error(folder):
    with pytest.raises(AdapterError, match="says itself what alpha is"):
        lk.Adapter.load(folder, alpha=4)


@pytest.mark.parametrize("format", ["peft", "loralib", "kohya", "diffusers", "gguf"])
def test_a_place_that_is_taken_is_named_with_what_to_do(tmp_path, format):
    name = "model.layers.0.self_attn.q_proj" if format == "gguf" else "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = 64 if format == "gguf" else 1280
    factors = lk.Factors(torch.randn(2, width), torch.randn(width, 2), 2.0)
    adapter = lk.Adapter(lk.LoraConfig(rank=2, alpha=2, targets=["q"]), {name: factors})
    options = {"base": {"model_type": "llama", "num_attention_heads": 4}} if format == "gguf" else {}
    suffix = {"gguf": ".gguf", "loralib": ".pt", "peft": ""}.get(format, ".safetensors")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        WriteError, match=rf"cannot write {tmp_path}/file/a.*: {tmp_path}/file is a file, not a folder\n  give another place"
    ):
        adapter.save(tmp_path / "file" / f"a{suffix}", format, **options)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(WriteError, match="is a device or the like"):
        write_text(pipe, "text")
    assert pipe.is_fifo()


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "page.html").mkdir()
    for write in (lambda p: write_text(p, "x"), lambda p: write_tensors(p, {"a": torch.zeros(2)})):
        with pytest.raises(WriteError, match=r"page\.html: there is a folder of that name\n  give another name"):
            write(tmp_path / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(WriteError, match="the name is too long"):
        write_text(tmp_path / ("x" * 250), "x")


@pytest.mark.parametrize("number", ["EACCES", "ENOSPC", "EROFS"])
def test_no_permission_and_no_space_are_said_in_words(tmp_path, monkeypatch, number):
    import errno

    told = {"EACCES": "no permission to write in", "ENOSPC": "no space is left on the disk", "EROFS": "can only be read"}[number]

    def refuse(*args, **kwargs):
        raise OSError(getattr(errno, number), "raw words", str(tmp_path))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/a.txt: .*{told}") as caught:
        write_text(tmp_path / "a.txt", "x")
    assert "raw words" not in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_a_disk_that_fills_up_is_said_in_words_whichever_library_writes(tmp_path):
    """A limit on the size of files stands for the full disk: the writers meet it in the same call."""
    tensors = {"a": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    told = []
    try:
        for write in (
            lambda p: write_text(p, "x" * 100_000),
            lambda p: write_tensors(p, tensors),
            lambda p: lk.Adapter(lk.LoraConfig(), {"q": lk.Factors(torch.ones(2, 50_000), torch.ones(3, 2), 1.0)}).save(p, "loralib"),
        ):
            try:
                write(tmp_path / "out.pt")
            except WriteError as error:
                told.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(told) == 3, told
    assert all(f"cannot write {tmp_path}/out.pt: " in line for line in told)
    assert not list(tmp_path.iterdir())
