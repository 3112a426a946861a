"""Which syntax a chat template writes, recognized by its text, so that no list of model names has to be right.

The first that fits is taken. A template that none fits has its calls left as content.
"""

from __future__ import annotations

from .bare_json import LLAMA, PLAIN
from .deepseek import DEEPSEEK
from .gemma import GEMMA
from .glm import GLM
from .harmony import HARMONY
from .json_blocks import HERMES
from .mistral import MISTRAL
from .python_calls import PYTHON_CALLS
from .syntax import Syntax
from .xml_parameters import XML_PARAMETERS

SYNTAXES = (XML_PARAMETERS, GLM, HERMES, MISTRAL, DEEPSEEK, GEMMA, PYTHON_CALLS, HARMONY, LLAMA)

__all__ = ["PLAIN", "SYNTAXES", "syntax_of"]


def syntax_of(template: str) -> Syntax | None:
    """Return the syntax of a chat template's text, None if it is not known."""
    return next((syntax for syntax in SYNTAXES if syntax.writes(template)), None)
