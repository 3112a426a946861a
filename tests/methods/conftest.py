"""A tiny model and its rows on disk, made once, and a run's configuration."""

from tiny_runs import data_file, make_config, model_folder  # noqa: F401
