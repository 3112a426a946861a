"""Memory and processor time within the limits of nested control groups, in both versions."""

from __future__ import annotations

import torch

from lorakit.bases import limits
from lorakit.export.logits import _free_memory


def groups(tmp_path, monkeypatch, lines, files):
    """Let `limits` read these files of control groups."""
    real = limits.Path

    def path(*parts):
        joined = "/".join(map(str, parts))
        return (
            real(tmp_path / joined.lstrip("/"))
            if joined.startswith(("/sys/fs/cgroup", "/proc/self/cgroup"))
            else real(*parts)
        )

    for name, text in {"/proc/self/cgroup": lines, **files}.items():
        file = tmp_path / name.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(limits, "Path", path)


def test_the_lowest_limit_of_nested_cgroups_counts(tmp_path, monkeypatch):
    files = {"/sys/fs/cgroup/a/cpu.max": "400000 100000\n", "/sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}
    groups(tmp_path, monkeypatch, "0::/a/b\n", files | {"/sys/fs/cgroup/a/memory.max": "1000\n"})
    assert limits.cpu_limit() == 4.0
    memory = limits.memory_of(torch.device("cpu"))
    if memory is not None:
        assert memory.total == 1000


def test_cgroup_v1_is_read_and_minus_one_is_no_limit(tmp_path, monkeypatch):
    lines = "4:cpu,cpuacct:/box\n3:memory:/box\n"
    groups(
        tmp_path,
        monkeypatch,
        lines,
        {"/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "150000\n", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"},
    )
    assert limits.cpu_limit() == 1.5


def test_cgroup_max_is_no_limit(tmp_path, monkeypatch):
    groups(tmp_path, monkeypatch, "0::/\n", {"/sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert limits.cpu_limit() is None


def test_export_counts_only_the_memory_that_a_control_group_leaves_free(tmp_path, monkeypatch):
    groups(tmp_path, monkeypatch, "0::/a\n", {"/sys/fs/cgroup/a/memory.max": f"{limits.resident() + 10**9}\n"})
    free = _free_memory()
    assert free is None or free < 2 * 10**9


def test_without_proc_and_sysconf_memory_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "Path", lambda *parts: tmp_path / "none")
    monkeypatch.delattr(limits.os, "sysconf")
    assert limits.memory_of(torch.device("cpu")) is None
    assert limits.resident() == 0
    assert limits.cpu_limit() is None
