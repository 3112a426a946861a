"""Nothing outside of the roots is opened, whatever a client names and whatever lies in them."""

from __future__ import annotations

import os
import socket

import pytest

from lorakit.errors import AdapterError, ConfigError
from lorakit.serve.guard.roots import Roots, check_place, open_below


@pytest.fixture
def folders(tmp_path):
    """root with a file and links, and a secret beside it."""
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "inner" / "file.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file.json").write_text("secret")
    return root


@pytest.mark.parametrize(
    "place",
    [
        "/etc/passwd",
        "~/x",
        "../secret",
        "inner/../../secret",
        "a\x00b",
        "inner\nfile",
        "C:\\x",
        "a\\b",
        "",
        "x" * 2_000,
        "inner:x",
    ],
)
def test_places_that_are_no_relative_path_are_refused(place, folders):
    with pytest.raises(AdapterError) as error:
        Roots([folders]).locate(place)
    assert str(folders) not in str(error.value)


@pytest.mark.parametrize("place", ["missing", "inner/file.json/x", "inner/" + "x" * 300, ".hidden"])
def test_places_with_nothing_there_are_none(place, folders):
    assert Roots([folders]).locate(place) is None


def test_the_first_root_that_has_a_place_counts(folders, tmp_path):
    other = tmp_path / "other"
    (other / "inner").mkdir(parents=True)
    assert Roots([other, folders]).locate("inner") == (other, other / "inner")
    assert Roots([folders, other]).locate("inner") == (folders, folders / "inner")
    assert Roots([other, folders]).locate("inner/file.json") == (folders, folders / "inner" / "file.json")


def test_links_count_by_what_they_lead_to(folders):
    (folders / "out").symlink_to(folders.parent / "secret")
    (folders / "out.json").symlink_to("../secret/file.json")
    (folders / "within").symlink_to("inner")
    (folders / "loop").symlink_to("loop")
    (folders / "itself").symlink_to(".")
    roots = Roots([folders])
    for place in ("out", "out/file.json", "out.json"):
        with pytest.raises(AdapterError, match="leads out"):
            roots.locate(place)
    for place in ("itself", "."):
        with pytest.raises(AdapterError, match="name one in it"):
            roots.locate(place)
    assert roots.locate("within") == (folders, folders / "inner")
    assert roots.locate("loop") is None


def test_a_root_may_be_a_link_itself(folders, tmp_path):
    (tmp_path / "link").symlink_to(folders)
    assert Roots([tmp_path / "link"]).locate("inner") == (folders, folders / "inner")


def test_what_is_no_folder_is_no_root(folders):
    for path in (folders / "missing", folders / "inner" / "file.json"):
        with pytest.raises(ConfigError, match="root of adapters"):
            Roots([path])


def test_without_roots_nothing_is_located():
    assert not Roots()
    with pytest.raises(ConfigError, match="--adapters"):
        Roots().locate("x")


def test_only_regular_files_within_are_opened(folders):
    os.mkfifo(folders / "pipe")
    (folders / "device").symlink_to("/dev/zero")
    (folders / "out.json").symlink_to("../secret/file.json")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folders / "socket"))
    for name in ("pipe", "device", "out.json", "socket", "inner", "missing"):
        with pytest.raises(AdapterError) as error:
            open_below(folders / name, folders)
        assert str(folders.parent) not in str(error.value)
    listener.close()
    for boundary in (folders, None):
        descriptor = open_below(folders / "inner" / "file.json", boundary)
        assert os.read(descriptor, 10) == b"{}"
        os.close(descriptor)


def test_without_a_boundary_pipes_and_devices_are_refused_too(folders):
    os.mkfifo(folders / "pipe")
    (folders / "out.json").symlink_to("../secret/file.json")
    for path in (folders / "pipe", folders / "inner", "/dev/zero"):
        with pytest.raises(AdapterError):
            open_below(type(folders)(path), None)
    os.close(open_below(folders / "out.json", None))


def test_a_folder_that_becomes_a_link_while_it_is_opened_leads_nowhere(folders, monkeypatch):
    real = os.open

    def exchanged(path, flags, *rest):
        if str(path).endswith("file.json"):
            (folders / "inner").rename(folders / "was")
            (folders / "inner").symlink_to("../secret")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", exchanged)
    with pytest.raises(AdapterError, match="exchanged"):
        open_below(folders / "inner" / "file.json", folders)


def test_no_descriptor_is_left_open_by_a_refusal(folders):
    os.mkfifo(folders / "pipe")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        with pytest.raises(AdapterError):
            open_below(folders / "pipe", folders)
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_a_place_is_given_back_as_a_path():
    assert str(check_place("a/./b//c")) == "a/b/c"
