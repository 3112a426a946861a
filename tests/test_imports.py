"""Every module of lorakit can be imported without the modules that only Unix has, as on Windows."""

from __future__ import annotations

import subprocess
import sys

UNIX_ONLY = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog")

CODE = f"""
import importlib, pkgutil, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name not in {UNIX_ONLY!r}:
            return None
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        # Other libraries have modules for each system, and import what this one has.
        if frame.f_globals["__name__"].startswith("lorakit"):
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

for name in {UNIX_ONLY!r}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())

import lorakit

names = [module.name for module in pkgutil.walk_packages(lorakit.__path__, "lorakit.")]
for name in names:
    if name != "lorakit.__main__":
        importlib.import_module(name)
print(len(names))
"""


def test_every_module_imports_without_the_modules_that_only_unix_has():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 250


def test_the_check_notices_a_module_that_only_unix_has():
    code = CODE.replace("import lorakit\n", 'exec("import resource", {"__name__": "lorakit.made_up"})\n', 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "No module named 'resource'" in done.stderr
