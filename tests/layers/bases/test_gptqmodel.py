"""GPTQ and AWQ by gptqmodel's own modules. The library is built from source, so it is not among the tests' packages;
`test_guards.py` has an imitation of what it does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    find_spec("gptqmodel") is None or find_spec("optimum.gptq") is None,
    reason="gptqmodel is not installed: pip install gptqmodel optimum (it is built from source)",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, backend, cls",
    [
        ("gptq", "gptq_torch_aten", "TorchAtenLinear"),
        ("act_order", "gptq_torch_aten", "TorchAtenLinear"),
        ("gptq", "gptq_torch", "TorchLinear"),
        ("awq", "torch_fused_awq", "TorchFusedAwqLinear"),
        ("awq", "torch_awq", "AwqTorchLinear"),
    ],
)
def test_its_modules_are_read_adapted_and_held_from_repacking(method, backend, cls, tmp_path):
    command = [sys.executable, str(TESTS / "gptqmodel_process.py"), method, backend, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["class"] == cls
    assert said["quantization"] == ("AWQ" if method == "awq" else "GPTQ")
    assert said["modules"] == 14
    assert said["dense"] < 1e-6
    assert said["logits"] < 2e-3
    assert said["gradients"] < 1e-2
    if said["attached"] == "has none":  # the class has no such switch
        assert said["after evaluation"] == "attached"
    else:
        assert (said["attached"], said["detached"]) == ("train", None)
        assert "was repacked by gptqmodel" in said["after evaluation"]
