"""What an adapter must fit, checked here before vLLM is asked: the base as a model without weights.

vLLM passes over some of what does not fit (a module of another name, values of another base) and then answers with the
base alone, or with noise; here it is an error that names the module.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from ...adapter.adapter import Adapter
from ...bases.load import end_tokens, load_config, load_tokenizer, model_path
from ...checkpoint.same_base import compare_with_base
from ...errors import AdapterError, LorakitError

_TASKS = (None, "CAUSAL_LM")  # PEFT's task types of adapters that write text


class BaseShell:
    """A base's architecture, vocabulary and end tokens, without its weights. Thread-safe."""

    def __init__(self, base: str, revision: str | None = None):
        """Build it. Slow, as it imports transformers. Raises LorakitError if it is not a causal language model."""
        import torch
        from transformers import AutoModelForCausalLM

        config = load_config(base, revision)
        try:
            with torch.device("meta"):
                self._model: Any = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise LorakitError(
                f"'{base}' is a {config.model_type}, which transformers has no causal language model for\n"
                "  lorakit serve is for models that write text"
            ) from error
        self.base = base
        self.vocabulary = int(config.get_text_config(decoder=True).vocab_size)
        own = load_tokenizer(base, revision).eos_token_id
        self.ends = frozenset([*end_tokens(base, revision), *([] if own is None else [own])])
        self._folder = _weights_folder(base, revision)
        self._one_at_a_time = threading.Lock()

    def bytes_of_adapter(self, rank: int) -> int:
        """Return the bytes of a LoRA of this rank on all linears, in 16 bits."""
        from torch import nn

        linears = (module for module in self._model.modules() if isinstance(module, nn.Linear))
        return sum(2 * rank * (linear.in_features + linear.out_features) for linear in linears)

    def check(self, adapter: Adapter) -> None:
        """Raise LorakitError if an adapter does not fit: its task, modules, shapes, or the base it was trained on."""
        from ...model.attach import attach
        from ...model.detach import detach

        task = adapter.config.task
        if task not in _TASKS:
            raise AdapterError(
                f"the adapter is for another task ({task}), and a server answers with text\n"
                "  lorakit predict gives its labels, vectors or texts for each row of a file"
            )
        with self._one_at_a_time:
            attach(self._model, adapter, name="checked", trainable=False)
            detach(self._model)
        lines = compare_with_base(self._folder, adapter) if self._folder is not None else []
        if lines:
            raise AdapterError("the adapter was trained on another base:\n  " + "\n  ".join(lines))


def _weights_folder(base: str, revision: str | None) -> Path | None:
    """Return the folder with the base's safetensors files, if they are on this machine; of a hub id, its snapshot."""
    path = Path(model_path(base))
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(base, "config.json", revision=revision)
        if not isinstance(found, str):
            return None
        path = Path(found).parent
    return path if any(path.glob("*.safetensors")) else None
