"""Write an adapter for another program: check it against the program's rules, write, read the file back and compare.

canonical.py  the canonical form: one rank, scale 1
rules.py      what each program accepts
image_programs.py  which keys of a file ComfyUI, A1111 and diffusers find
widest.py     the format that most image programs read
written.py    reads the file with independent code (arrays.py: the safetensors format; effect.py: the equations)
expected.py   what the file should do, from the adapter's own factors
verify.py     compares the two, element by element
logits.py     compares the two through a base
staging.py    writes the file to a temporary folder and moves it into place once everything agrees
into_base.py  merges what a program does not accept into a copy of the base
modelfile.py  Ollama's Modelfile
export.py     `export`, which calls all of these
merged.py     `export_merged`: base and adapter as one GGUF model (gguf_model.py, gguf_parameters.py and
              gguf_tokenizer.py: its parts; merged_verify.py: reads it back and compares)
"""

from .export import Exported, export
from .rules import RECEIVERS, Finding, findings

__all__ = ["RECEIVERS", "Exported", "Finding", "export", "findings"]
