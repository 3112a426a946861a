"""What every file format promises. A new format is a line of CASES."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit import formats
from lorakit.adapter.dense import Dense
from lorakit.adapter.experts import ExpertFactors
from lorakit.errors import AdapterError, ConfigError
from lorakit.formats.format import Format

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "hidden_size": 8,
}
LANGUAGE = {Q: 8, V: 8}
IMAGE = {ATTENTION + "to_q": 320, ATTENTION + "to_k": 320}
TRAITS = {  # the documented ones, which the command line and the cards go by
    "is_folder": {"peft", "adalora", "mlx"},
    "takes_alpha": {"loralib", "mlx"},
    "takes_packed": {"loralib"},
    "takes_blocks": {"gguf"},
    "tells_model": {"kohya", "diffusers", "comfyui"},
}


@dataclass(frozen=True)
class Case:
    """`modules`: module -> width, of an adapter that the format holds; `path`: where it is written, relative.
    `saves`: the options to write and to read with; `reads`: to read with besides. `detected`: the format that a file
    of it is taken for, if another. `holds_dense`: it holds a dense update of one of the modules. `rounds`: it has
    the factors in another form, so that ΔW is equal within the rounding of float32.
    """

    modules: dict[str, int]
    path: str
    saves: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, Any] = field(default_factory=dict)
    detected: str | None = None
    holds_dense: bool = False
    rounds: bool = False


CASES = {
    "peft": Case(LANGUAGE, "lora"),
    "adalora": Case(LANGUAGE, "lora", detected="peft", rounds=True),
    "loralib": Case(LANGUAGE, "lora.pt", reads={"alpha": 4.0}),
    "kohya": Case(IMAGE, "lora.safetensors", holds_dense=True),
    "diffusers": Case(IMAGE, "lora.safetensors"),
    "comfyui": Case(IMAGE, "lora.safetensors", detected="diffusers", holds_dense=True),
    "cloneofsimo": Case(IMAGE, "lora.safetensors"),
    "mlx": Case(LANGUAGE, "lora"),
    "gguf": Case(LANGUAGE, "lora.gguf", saves={"base": LLAMA}),
}


@pytest.fixture(params=formats.FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def form(name: str) -> Format:
    return formats.format_named(name)


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


def adapter_of(modules: dict[str, int], change: Any = None) -> lk.Adapter:
    """Factors of rank 2 and alpha 4 that every precision holds exactly; `change`: another update of the last module."""
    made = torch.Generator().manual_seed(0)
    updates: dict[str, Any] = {
        module: lk.Factors(
            torch.randint(-8, 9, (2, width), generator=made) / 8,
            torch.randint(-8, 9, (width, 2), generator=made) / 8,
            4.0,
        )
        for module, width in modules.items()
    }
    if change is not None:
        updates[next(reversed(modules))] = change
    config = lk.LoraConfig(rank=2, alpha=4, targets=sorted({module.rsplit(".", 1)[-1] for module in modules}))
    return lk.Adapter(config, updates)


def unheld(case: Case) -> lk.Adapter:
    """An adapter with an update that the format has no place for."""
    if case.holds_dense:  # any kind, but no saved weights
        held = adapter_of(case.modules)
        return lk.Adapter(held.config, held.updates, saved={"head.weight": torch.ones(2, 2)})
    return adapter_of(case.modules, Dense(torch.ones(2 * [list(case.modules.values())[-1]])))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_its_file_defines_it_under_its_name(form, name):
    assert isinstance(form, Format)
    assert form.name == name
    assert {trait: getattr(form, trait) for trait in TRAITS} == {t: name in names for t, names in TRAITS.items()}


def test_every_format_has_a_case_and_a_place_in_the_order_of_detection():
    assert CASES.keys() == set(formats.FORMATS)
    never = {name for name, case in CASES.items() if case.detected is not None}
    assert sorted(formats.DETECTED) == sorted(set(formats.FORMATS) - never)
    assert formats.FOLDERS == ("peft", "adalora", "mlx")
    assert formats.TAKES_ALPHA == ("loralib", "mlx")
    assert formats.TELLS_MODEL == ("kohya", "diffusers", "comfyui")


def test_what_it_writes_is_detected_and_read_back_equal(name, form, case, tmp_path):
    adapter = adapter_of(case.modules)
    assert form.losses(adapter, tmp_path / case.path) == []
    path = formats.save(adapter, tmp_path / case.path, name, **case.saves)
    assert path == tmp_path / case.path
    assert path.is_dir() == form.is_folder
    assert formats.format_of(path) == (case.detected or name)
    assert formats.weights_of(path).is_file()
    for format in (None, name):
        found = formats.load(path, format=format, **case.saves, **case.reads)
        assert found.updates.keys() == adapter.updates.keys()
        for module, update in adapter.updates.items():
            off = (found.updates[module].delta() - update.delta()).abs().max()
            assert off <= (1e-5 if case.rounds else 0), module


def test_no_other_format_owns_what_it_writes(name, case, tmp_path):
    path = formats.save(adapter_of(case.modules), tmp_path / case.path, name, **case.saves)
    owners = {other for other in formats.FORMATS if formats.format_named(other).owns(path)}
    assert owners <= {case.detected or name}
    if path.is_dir():  # a folder has no names of tensors to ask about
        assert owners


def test_it_lists_what_it_cannot_hold_and_writes_nothing_of_it(name, form, case, tmp_path):
    adapter = unheld(case)
    path = tmp_path / case.path
    lost = form.losses(adapter, path)
    assert lost
    assert formats.losses(adapter, name, path) == lost
    with pytest.raises(AdapterError, match="cannot hold all of this adapter") as raised:
        formats.save(adapter, path, name, **case.saves)
    assert all(line in str(raised.value) for line in lost)
    assert files_in(tmp_path) == {}


def test_factors_of_experts_are_held_or_refused_and_never_dropped(name, form, case, tmp_path):
    experts = ExpertFactors(torch.ones(2, 2, 8), torch.ones(2, 8, 2), 4.0)
    names = (*case.modules, "model.layers.0.mlp.experts.down_proj")
    updates = {**adapter_of(case.modules).updates, names[-1]: experts}
    adapter = lk.Adapter(lk.LoraConfig(rank=2, alpha=4, targets=list(names)), updates)
    path = tmp_path / case.path
    if name == "peft":
        assert torch.equal(formats.load(formats.save(adapter, path, name)).updates[names[-1]].A, experts.A)
        return
    assert any("down_proj" in line for line in form.losses(adapter, path))
    with pytest.raises(AdapterError, match="cannot hold all of this adapter"):
        formats.save(adapter, path, name, **case.saves)
    assert files_in(tmp_path) == {}


def test_an_error_leaves_what_was_there(name, case, tmp_path):
    path = formats.save(adapter_of(case.modules), tmp_path / case.path, name, **case.saves)
    before = files_in(tmp_path)
    with pytest.raises(AdapterError):
        formats.save(unheld(case), path, name, **case.saves)
    assert files_in(tmp_path) == before


def test_options_that_it_does_not_take_are_refused(name, form, case, tmp_path):
    path = formats.save(adapter_of(case.modules), tmp_path / case.path, name, **case.saves)
    if not form.takes_alpha:
        with pytest.raises(AdapterError, match=rf"is a {name} adapter, which holds its alpha\n  leave out alpha"):
            formats.load(path, format=name, alpha=4.0)
    if not form.takes_packed:
        with pytest.raises(AdapterError, match=rf"is a {name} adapter, and packed is for loralib's MergedLinear"):
            formats.load(path, format=name, packed={"q_proj": [True, False]})
    with pytest.raises(ConfigError, match=r"there is no model type 'sdl1'(?s:.)*known: "):
        formats.load(path, format=name, model_type="sdl1")


def test_blocks_of_8_bits_are_refused_or_written(name, form, case, tmp_path):
    if form.takes_blocks:
        path = formats.save(adapter_of(case.modules), tmp_path / case.path, name, dtype="q8_0", **case.saves)
        assert formats.format_of(path) == name
        return
    with pytest.raises(AdapterError, match=f"q8_0 is a type of GGUF's tensors, which {name} does not have"):
        formats.save(adapter_of(case.modules), tmp_path / case.path, name, dtype="q8_0", **case.saves)
    assert files_in(tmp_path) == {}


def test_a_dtype_by_name_is_refused(name, case, tmp_path):
    with pytest.raises(AdapterError, match="dtype is 'bf16'; expected a torch dtype"):
        formats.save(adapter_of(case.modules), tmp_path / case.path, name, dtype="bf16", **case.saves)
    assert files_in(tmp_path) == {}


def test_saving_again_deletes_what_a_reader_would_take_for_a_part(name, form, case, tmp_path):
    path = tmp_path / case.path
    folder = path if form.is_folder else path.parent
    for file in form.stale(path):
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"old")
    formats.save(adapter_of(case.modules), path, name, **case.saves)
    assert all(data != b"old" for data in files_in(tmp_path).values())


def test_saved_as_it_was_read_it_keeps_every_update(name, case, tmp_path):
    first = formats.save(adapter_of(case.modules), tmp_path / "a" / case.path, name, **case.saves)
    adapter = formats.load(first, format=name, **case.saves, **case.reads)
    again = formats.save_as_read(adapter, tmp_path / "b" / case.path, name, **case.saves)
    found = formats.load(again, format=name, **case.saves, **case.reads)
    assert found.updates.keys() == adapter.updates.keys()
    assert formats.format_of(again) == formats.format_of(first)
    for module, update in adapter.updates.items():
        off = (found.updates[module].delta() - update.delta()).abs().max()
        assert off <= (1e-5 if case.rounds else 0), module


@pytest.mark.parametrize("call", ["save", "load", "losses", "stale", "save_as_read"])
def test_an_unknown_format_is_named_with_the_nearest(call, tmp_path):
    adapter = adapter_of(LANGUAGE)
    calls = {
        "save": lambda: formats.save(adapter, tmp_path / "x", "pefd"),
        "load": lambda: formats.load(tmp_path, format="pefd"),
        "losses": lambda: formats.losses(adapter, "pefd"),
        "stale": lambda: formats.stale("pefd", tmp_path),
        "save_as_read": lambda: formats.save_as_read(adapter, tmp_path / "x", "pefd"),
    }
    with pytest.raises(AdapterError, match=r"unknown adapter format 'pefd'.*peft"):
        calls[call]()
    assert files_in(tmp_path) == {}


def test_the_package_has_no_other_attributes():
    assert not hasattr(formats, "FOLDRS")
