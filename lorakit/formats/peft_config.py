"""Convert PEFT's `adapter_config.json` to `LoraConfig` and back (peft 0.21)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..config import NONE, PEFT_NAMES, PRESETS, LoraConfig
from ..errors import AdapterError, ConfigError
from ..module_names import ends_with, matches
from ..ops.quantized import blockwise, int8
from . import peft_parameters

# PEFT's task_types; it refuses a config with another one. Those that lorakit has besides are in lorakit.json.
TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
TASK = "task"

# Settings that change what the adapter computes and that lorakit does not have: refused unless false or empty.
_UNSUPPORTED = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "layer_replication": "layer replication",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}

# Initializations that subtract something from the base's weights, which a reader would have to repeat. (eva,
# orthogonal, gaussian and mica leave the base as it is. "milora" is in forks of PEFT, done like pissa.)
_SUBTRACTED = ("pissa", "milora", "corda", "olora", "lora_ga")

# PEFT's `target_modules` of an adapter that adapts none, as its own X-LoRA writes it.
_NO_TARGETS = "dummy-target-modules"

# PEFT's other kinds of adapter, and what their users can do.
_MERGE = "merge it into its base with PEFT (merge_and_unload); `lorakit extract` makes a LoRA of the change"
_PROMPT = "it adds inputs and changes no weight, so no LoRA has the same effect: use it with PEFT"
_OTHERS = {
    "OFT": ("OFT rotates weights", _MERGE),
    "BOFT": ("BOFT rotates weights", _MERGE),
    "HRA": ("HRA reflects weights", _MERGE),
    "MULTITASK_PROMPT_TUNING": ("prompt tuning", _PROMPT),
    "ADAPTION_PROMPT": ("LLaMA-Adapter", _PROMPT),
    "CPT": ("context prompt tuning", _PROMPT),
}


def changed_base(values: Mapping[str, Any]) -> str | None:
    """Return the initialization of a config if the base's weights are others for it ("pissa", "olora"...), else None.

    LoftQ puts Q(W) into the base. With one iteration that is the base quantized, which users have (`loftq_base`); with
    more it is another model.
    """
    start = values.get("init_lora_weights")
    start = start.lower() if isinstance(start, str) else ""
    changed = start.startswith(_SUBTRACTED) or (start == "loftq" and loftq_base(values) is None)
    return start if changed else None


def own_task(config: LoraConfig) -> dict[str, str]:
    """Return what lorakit.json holds of the task: PEFT reads no other task_type than its own."""
    return {TASK: config.task} if config.task is not None and config.task not in TASK_TYPES else {}


def loftq_base(values: Mapping[str, Any]) -> str | None:
    """Return how the base must be quantized for an adapter that PEFT started with LoftQ (as `BaseWeight.quantization`
    says it); None for other adapters, and where no quantization of the base is what it needs.
    """
    settings = values.get("loftq_config")
    settings = settings if isinstance(settings, Mapping) else {}
    if str(values.get("init_lora_weights")).lower() != "loftq" or settings.get("loftq_iter", 1) != 1:
        return None
    return {4: blockwise.TITLE, 8: int8.TITLE}.get(settings.get("loftq_bits", 4))


def from_peft(values: Mapping[str, Any], where: Path | str, started: bool = False) -> tuple[LoraConfig, bool]:
    """(our config, fan_in_fan_out). AdapterError for another kind of adapter, an unsupported setting or a wrong value.

    where: the file, for errors. started: accept initializations from the base's weights.
    """
    kind = values.get("peft_type")
    if kind != "LORA":
        what, advice = _OTHERS.get(str(kind), ("", "")) if isinstance(kind, str) else ("", "")
        raise AdapterError(
            f"{where}: peft_type is {kind!r}; lorakit reads LORA adapters, ADALORA, IA3, LN_TUNING, LOHA, LOKR, VERA, "
            "TRAINABLE_TOKENS, PREFIX_TUNING, PROMPT_TUNING and P_TUNING" + (f"\n  {what}: {advice}" if what else "")
        )
    for key, name in _UNSUPPORTED.items():
        if values.get(key):
            raise AdapterError(
                f"{where}: {key} is {values[key]!r}: {name} is not supported\n"
                "  merge it into its base with the tool that made it"
            )
    if changed_base(values) is not None and not started:
        raise AdapterError(
            f"{where}: init_lora_weights is {values['init_lora_weights']!r}: it was initialized from the base's "
            "weights, which that changed, so its factors alone are another update\n"
            "  PiSSA, MiLoRA and OLoRA can be converted to a plain LoRA with their base: lorakit convert ADAPTER OUT "
            "--to peft --base FOLDER\n"
            "  or save it again with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    values = peft_parameters.as_targets(values, where)
    ours: dict[str, Any] = {our: values[theirs] for theirs, our in PEFT_NAMES.items() if given(values.get(theirs))}
    if ours.get("targets") == _NO_TARGETS:
        ours["targets"] = NONE
    ours.setdefault("rank", 8)  # PEFT's own defaults, which it may leave out
    ours.setdefault("alpha", 8)
    if isinstance(ours.get("layers"), int):
        ours["layers"] = [ours["layers"]]
    if isinstance(ours.get("layers_pattern"), str):
        ours["layers_pattern"] = [ours["layers_pattern"]] if ours["layers_pattern"] else []
    if isinstance(ours.get("save_modules"), str):
        ours["save_modules"] = [ours["save_modules"]]
    if values.get("init_lora_weights") == "gaussian":
        ours["init"] = "gaussian"
    return checked(where, lambda: LoraConfig(**ours)), bool(values.get("fan_in_fan_out", False))


def given(value: Any) -> bool:
    """Whether a field says anything. None, false, "", [] and {} mean "not given", as in PEFT; 0 is a number."""
    return bool(value) or (isinstance(value, int | float) and not isinstance(value, bool))


def checked(where: Path | str, make: Callable[[], LoraConfig]) -> LoraConfig:
    """The result of `make`, a config out of a file's values. AdapterError naming the file if they are wrong."""
    try:
        return make()
    except ConfigError as error:
        raise AdapterError(f"{where}: {error}") from error


def to_peft(
    config: LoraConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    transposed: bool,
    dora: bool = False,
    parameters: Collection[str] = (),
) -> dict[str, Any]:
    """PEFT's fields. `ranks`, `alphas`: module -> value of the written tensors, which overrule the config's.
    `parameters`: those of these names that are parameters (weights of experts), no modules.
    """
    modules = [m for m in ranks if m not in parameters]
    targets = config.targets
    if targets == NONE and not ranks:
        targets = _NO_TARGETS
    elif targets in PRESETS or config.exclude or config.layers or not all(matches(m, targets) for m in ranks):
        targets = sorted(modules)
    elif parameters:
        targets = (
            [t for t in targets if any(ends_with(m, t) for m in modules)] if isinstance(targets, list) else modules
        )
    rank, rank_pattern = _pattern(ranks, config.rank, config.rank_pattern, config.rank_of)
    alpha, alpha_pattern = _pattern(alphas, config.alpha, config.alpha_pattern, config.alpha_of)
    return {
        "alpha_pattern": {k: _plain(v) for k, v in alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": config.base,
        "bias": config.bias,
        "exclude_modules": None,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _plain(alpha),
        "lora_bias": False,
        # PEFT refuses any for parameters, also where nothing is trained.
        "lora_dropout": 0.0 if parameters else config.dropout,
        "modules_to_save": list(config.save_modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": config.revision,
        "target_modules": targets,
        **({"target_parameters": peft_parameters.entries(config, parameters)} if parameters else {}),
        "task_type": config.task if config.task in TASK_TYPES else None,
        "use_dora": dora,
        "use_rslora": config.rslora,
    }


def dumps(values: Mapping[str, Any]) -> str:
    """JSON as PEFT writes it: sorted keys, indent 2."""
    return json.dumps(values, indent=2, sort_keys=True)


def _pattern(
    values: Mapping[str, Any], default: Any, pattern: Mapping[str, Any], of: Callable[[str], Any]
) -> tuple[Any, dict[str, Any]]:
    """The config's own default and pattern if they agree with `values`; else the most common value and a key for each
    other module. `of`: the config's value of a module.
    """
    if all(of(module) == value for module, value in values.items()):
        return default, dict(pattern)
    common = Counter(values.values()).most_common(1)[0][0]
    # "^" keeps the key from matching a longer name that ends in this one.
    return common, {f"^{module}": value for module, value in values.items() if value != common}


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
