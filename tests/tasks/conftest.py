"""The byte tokenizer and tiny models, and a run's configuration, as fixtures."""

from __future__ import annotations

from byte_models import gpt2, llama, make_item, t5, tokenizer  # noqa: F401
from tiny_runs import data_file, make_config, model_folder  # noqa: F401
