"""An adapter for a program that receives it: checked against the program's rules, written in its format, read again and compared.

canonical.py  the plainest form: one rank, scale 1
rules.py      what each program accepts
verify.py     the written file, read on a path of its own
export.py     `export`: all of it
"""

from .export import Exported, export
from .rules import RECEIVERS, Finding, findings

__all__ = ["RECEIVERS", "Exported", "Finding", "export", "findings"]
