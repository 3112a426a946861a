"""An adapter for a program that receives it: checked against the program's rules, written in its format, read again and compared.

canonical.py  the plainest form: one rank, scale 1
rules.py      what each program accepts
written.py    the written file, read on a path of its own (arrays.py: safetensors by its specification; effect.py: the equations)
expected.py   what it should do, from the adapter's own factors
verify.py     both compared, number by number
logits.py     both compared through a base
tried.py      the file under a trial name, until both agree
into_base.py  what a program does not take, in a copy of the base
modelfile.py  Ollama's
export.py     `export`: all of it
merged.py     `export_merged`: base and adapter as one GGUF model (gguf_model.py: its tensors, gguf_parameters.py, gguf_tokenizer.py;
              merged_verify.py: the file, read again)
"""

from .export import Exported, export
from .rules import RECEIVERS, Finding, findings

__all__ = ["RECEIVERS", "Exported", "Finding", "export", "findings"]
