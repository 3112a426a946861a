"""Scripts are imported from their folder, which an installed lorakit does not have."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("scripts/ is not part of an installed lorakit", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))
