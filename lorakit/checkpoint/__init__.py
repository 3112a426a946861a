"""Adapters meet checkpoint files: merging into a model on disk, and taking a change out of it, without building the
model.

base.py      a folder or a single file, opened but not read
parts.py     what is merged into: a folder, a pipeline's components, a single file
names.py     the adapter's module names and the files' tensor names
where.py     where each module's weight lies
ties.py      weights that the files hold once and the model uses twice
weights.py   the base's weights of some modules, one at a time
same_base.py whether it is the base that an adapter was trained on
residual.py  PiSSA and OLoRA as plain LoRA of their base

update.py    what one weight gains, of each kind of update
changes.py   what several adapters together do to the tensors
plan.py      what OUT will hold: each tensor, and what is done to it
tensors.py   writing that, block by block, and reading it back
out.py       the place that is written to: whole, or not there at all
merge.py     `merge_checkpoint`: all of it
report.py    `MergeReport`: what was merged, as measured on what was written

modules.py   which module each tensor is the weight of
pairs.py     the tensors of two checkpoints, side by side
extract.py   a LoRA out of two checkpoints
"""

from .merge import merge_checkpoint
from .report import MergeReport, TargetReport

__all__ = ["MergeReport", "TargetReport", "merge_checkpoint"]
