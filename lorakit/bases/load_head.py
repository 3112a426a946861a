"""Load a base by any of transformers' auto classes, with or without a head that is trained with the adapter.

    load_with_head(AutoModelForTokenClassification, "bert-base-cased", dtype, device, changes=labelled(["O", "PER"]))

The head is fresh, at random (seed torch first), unless the folder holds one. Everything else must be in the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import Quantization
from ..errors import LorakitError, listing
from .load import from_pretrained, load_config, ready, storage_options
from .quantize import HEADS

if TYPE_CHECKING:
    import torch


def labelled(names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a model's config that hold its label names, in the order of their ids."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
    }


def load_with_head(
    auto_class: Any,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    changes: Mapping[str, Any] | None = None,
    trained: Sequence[str] = (),
    quantization: Quantization | None = None,
) -> Any:
    """Load a base model onto `device`, in eval mode.

    auto_class: transformers' class, such as AutoModelForTokenClassification
    changes: fields of the model's config to set first: num_labels, id2label, problem_type; see `labelled`
    trained: modules besides the head (`quantize.HEADS`) that may be fresh too, as they are trained and saved
    quantization: how to quantize it while loading; None: as its checkpoint is

    Raises LorakitError if it cannot be loaded, or lacks weights other than those of the head.
    """
    from transformers.utils import logging

    changes = dict(changes or {})
    config = load_config(name, revision, trust_remote_code)
    options = storage_options(
        quantization or Quantization(),
        name,
        config,
        lambda: auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code),
        dtype,
        device,
        trained,
    )
    if "config" in options:  # which transformers takes as it is
        for setting, value in changes.items():
            setattr(options["config"], setting, value)
    else:
        options |= changes
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is fresh is no news
    try:
        model, loaded = from_pretrained(
            auto_class,
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            output_loading_info=True,
            key_mapping=trunk_names(auto_class, config),
            ignore_mismatched_sizes=True,  # a head for other labels is replaced; see below for the rest
            **options,
        )
    finally:
        logging.set_verbosity(said)
    fresh = (*HEADS, *trained)
    missing = sorted(key for key in loaded["missing_keys"] if not any(f".{module}." in f".{key}" for module in fresh))
    if missing:
        raise LorakitError(
            f"'{name}' lacks weights that its {type(model).__name__} needs: {listing(missing, 3)}\n"
            f"  have them trained and saved with the head: save_modules: [{missing[0].rpartition('.')[0]}]"
        )
    other = sorted(
        f"{key} {list(there)}, expected {list(here)}"
        for key, there, here in loaded["mismatched_keys"]
        if not any(f".{module}." in f".{key}" for module in fresh)
    )
    if other:
        raise LorakitError(
            f"'{name}' has weights of other sizes than its {type(model).__name__} needs: {listing(other, 3)}\n"
            "  its config.json is another model's"
        )
    return ready(model, device, "quantization_config" in options)


def trunk_names(auto_class: Any, config: Any) -> dict[str, str] | None:
    """Return how a checkpoint's names of the trunk are spelled in the class with the head, for `from_pretrained`.

    LlamaForQuestionAnswering calls `transformer` what checkpoints of Llama call `model`, and would start with a trunk
    at random (transformers 5.24). None where both have one name.
    """
    from transformers import PreTrainedModel

    mapping = getattr(auto_class, "_model_mapping", {})
    own = mapping[type(config)] if type(config) in mapping else None
    own = own[0] if isinstance(own, tuple) else own
    if own is None:
        return None
    prefixes = [
        cls.__dict__["base_model_prefix"]
        for cls in own.__mro__
        if issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel and "base_model_prefix" in cls.__dict__
    ]
    return {rf"^{prefixes[-1]}\.": f"{prefixes[0]}."} if len(set(prefixes)) > 1 else None
