"""A disk that takes nothing more is said without the paths of this machine."""

from __future__ import annotations

import errno
import tempfile

import pytest
from served_app import root

from lorakit.errors import WriteError
from lorakit.serve.api.errors import described
from lorakit.serve.guard.adapter_files import HTTP
from lorakit.serve.sources import files_at, read_adapter


def test_a_client_hears_of_the_disk_and_not_of_its_paths():
    status, body, headers = described(WriteError("cannot write /home/me/state.json: no space left on device"))
    assert (status, headers) == (503, {"x-should-retry": "false"})
    assert body["error"]["code"] == "disk"
    assert "/home" not in body["error"]["message"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOENT])
def test_an_adapter_that_cannot_be_copied_for_lack_of_space_is_not_called_broken(monkeypatch, code):
    """Python looks for a folder that it can write to, and finds none on a full disk: ENOENT."""

    def full(*_, **__):
        raise OSError(code, "the disk is full")

    files = files_at(root() / "sql", "sql", root(), HTTP)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(WriteError, match="no space is left"):
        read_adapter(files)
