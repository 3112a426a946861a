"""Damaged files of every format: each gives a sound adapter or an error of lorakit's, and nothing else.

`scripts/fuzz_readers.py` does the same with as many as one likes.
"""

from __future__ import annotations

import random

import pytest
from damaged import damage, sound

import lorakit as lk
from lorakit.errors import LorakitError

COUNT = 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return sound(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(
    "format", ["peft", "peft config", "loralib", "mlx", "mlx config", "gguf", "kohya", "diffusers"]
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_refused_or_still_sound(files, format):
    path, rng, refused = files[format], random.Random(format), 0
    good = path.read_bytes()
    where = path.parent if path.suffix == ".json" else path
    options = (
        {"alpha": 2.0} if path.suffix == ".pt" else {"base": path.parent / "base"} if path.suffix == ".gguf" else {}
    )
    assert lk.Adapter.load(where, **options).updates
    try:
        for _ in range(COUNT):
            path.write_bytes(damage(good, rng))
            try:
                for update in lk.Adapter.load(where, **options).updates.values():
                    update.delta()
            except LorakitError:
                refused += 1
    finally:
        path.write_bytes(good)
    assert refused > COUNT // 3
