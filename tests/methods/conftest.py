from __future__ import annotations

from tiny_runs import data_file, make_config, model_folder  # noqa: F401
