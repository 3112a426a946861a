"""An adapter meets checkpoint files: merging into a model's folder on disk, without building the model.

base.py     the folder: its config and where each tensor lies
names.py    the adapter's module names and the files' tensor names
ties.py     weights that the files hold once and the model uses twice
plan.py     what OUT will hold: each tensor, and what is done to it
tensors.py  writing that, block by block, and reading it back
merge.py    `merge_checkpoint`: the folder as a whole, atomically
report.py   `MergeReport`: what was merged, as measured on what was written
"""

from .merge import merge_checkpoint
from .report import MergeReport, TargetReport

__all__ = ["MergeReport", "TargetReport", "merge_checkpoint"]
