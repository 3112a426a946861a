"""Adapters and checkpoint files: merge into a model on disk, or extract an adapter from one, without building the
model.

base.py          opens a folder or a single file; reads headers only
parts.py         the parts of a base: a folder, a pipeline's components, a single file
renaming.py      maps an adapter's names to the files' tensor names
locate.py        finds each module's weight in the files
single_file.py   the layout of diffusion models' single files
tied_weights.py  weights that are stored once and used twice
weights.py       reads the base's weights of some modules, one at a time
same_base.py     compares a base with an adapter's fingerprint
residual.py      PEFT's PiSSA, MiLoRA and OLoRA as plain LoRA of their base
conv1d.py        which modules store their weight as [in, out]
quantized/       formats of quantized weights: read as the weights they stand for, and written

change.py        one update applied to one stored weight
changes.py       the changes of all adapters, by tensor
requantize.py    merged weights quantized again, and what is left of ΔW
onto.py          a quantized base and the one it was made from: whether it is the same, and what differs
merge_plan.py    what OUT will hold: each tensor, and how it is made
write.py         writes the tensors block by block and reads them back
out.py           checks OUT, and puts the result in place atomically
out_config.py    OUT's config and index
conversation.py  the chat template and the end tokens of a merged language model
merge.py         `merge_checkpoint`: all of that
merge_report.py  `MergeReport`: what was merged, measured on the written files

modules.py       which module each tensor is the weight of
pairs.py         the tensors of two checkpoints, side by side
extract.py       a LoRA out of two checkpoints
"""

from .merge import merge_checkpoint
from .merge_report import MergeReport, TargetReport

__all__ = ["MergeReport", "TargetReport", "merge_checkpoint"]
