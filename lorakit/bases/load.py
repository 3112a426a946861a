"""Load a base model and its tokenizer: the embedded one, a folder, or a hub id. A base may be quantized on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Quantization
from ..errors import LorakitError, did_you_mean, listing, not_the_file
from .hub_reach import check_hub, out_of_reach
from .quantize import check_kernel, loading_options
from .rope import SCALED, scaled
from .stored_weights import storage_of

if TYPE_CHECKING:
    import torch

EMBEDDED = "embedded"
EXPECTED = f"a model folder, a hub id, or '{EMBEDDED}'"
GENERATION_CONFIG = "generation_config.json"
_TOKENIZERS = ("tokenizer.json", "tekken.json")


def embedded_folder() -> Path:
    """Return the embedded model's folder, inside the package."""
    return Path(__file__).parent.parent / "assets" / "tiny-lm"


def model_path(name: str) -> str:
    """Return what to pass to transformers: the embedded model's folder, an existing folder, or `name` as a hub id.

    Raises LorakitError for a path that is not a model folder.
    """
    if name == EMBEDDED:
        return str(embedded_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise LorakitError(f"{name} is not a model folder: config.json is missing{_looks_like_adapter(path)}")
        return str(path)
    if path.is_file():
        raise LorakitError(
            f"{name} is a file; expected a model folder (config.json and weights), a hub id, or '{EMBEDDED}'"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise LorakitError(f"there is no model folder '{name}'{did_you_mean(path.name, siblings)}")
    return name


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a base model's tokenizer. Raises LorakitError if it is damaged, or if the folder has none."""
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, name, revision=revision, trust_remote_code=trust_remote_code)
    folder = Path(model_path(name))
    if folder.is_dir() and not _has_vocabulary(folder, tokenizer):
        raise LorakitError(
            f"'{name}' has no tokenizer: transformers makes up an empty {type(tokenizer).__name__}\n"
            "  put the model's tokenizer files into the folder (tokenizer.json and tokenizer_config.json)"
        )
    return tokenizer


def _has_vocabulary(folder: Path, tokenizer: Any) -> bool:
    """Whether the folder has a vocabulary: in a single file, or in all the files that the tokenizer's class reads."""
    if any(p.name in _TOKENIZERS or p.suffix in (".model", ".tiktoken") for p in folder.iterdir()):
        return True
    names = type(tokenizer).vocab_files_names
    required = [names[key] for key in ("vocab_file", "merges_file") if key in names]
    return all((folder / file).is_file() for file in required) and (bool(required) or not names)


def load_config(
    name: str, revision: str | None = None, trust_remote_code: bool = False, rope_scaling: str | None = None
) -> Any:
    """Load a base model's transformers config. `rope_scaling`: with its rotary positions scaled, see `rope`. Raises
    LorakitError.
    """
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, name, revision=revision, trust_remote_code=trust_remote_code)
    return scaled(config, rope_scaling, name)


def end_tokens(name: str, revision: str | None = None, trust_remote_code: bool = False) -> list[int]:
    """Return the ids that end the model's generation: its generation config's or, without one, its config's."""
    path = Path(model_path(name))
    try:
        if not path.is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, GENERATION_CONFIG, revision=revision)).parent
        found = json.loads((path / GENERATION_CONFIG).read_text(encoding="utf8")).get("eos_token_id")
    # The file is optional, and unreachable where only the hub's cache is at hand.
    except (OSError, ValueError, AttributeError):
        config = load_config(name, revision, trust_remote_code)
        found = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    found = found if isinstance(found, list) else [found]
    return [token for token in found if isinstance(token, int)]


def stop_at(model: Any, tokens: Sequence[int]) -> None:
    """Let the model's generation end at these tokens too."""
    settings = getattr(model, "generation_config", None)
    if settings is None or not tokens:
        return
    own = settings.eos_token_id
    own = own if isinstance(own, list) else [own]
    settings.eos_token_id = [*dict.fromkeys([*(token for token in own if token is not None), *tokens])]


def load_base(
    path: str | Path,
    *,
    quantize: str | None = None,
    double: bool = True,
    compute_dtype: str | torch.dtype = "auto",
    kernel: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    rope_scaling: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal or seq2seq language model to attach adapters to, in eval mode; quantized on the way if asked for.

    path: a model folder, a hub id, or "embedded", the model that lorakit has in it
    quantize: "nf4", "fp4" or "int8" (bitsandbytes), "torchao-int8", for the weights of its linears except the output
        layer's; None: as the checkpoint has them, which may be quantized already
    double: with nf4 and fp4, quantize the scales too: 4.13 instead of 4.5 bits a weight
    compute_dtype: with nf4 and fp4, the precision to multiply in, as torch's dtype, "bf16", "fp16" or "fp32"; "auto":
        `dtype`
    kernel: "gptqmodel" for that library's linears in a GPTQ or AWQ checkpoint; None: lorakit's own, in plain torch
    dtype: of everything that is not quantized, as torch's dtype, "bf16", "fp16" or "fp32"; "auto": bf16 if the device
        multiplies it, else float32
    device: None for an accelerator if there is one, else the CPU
    rope_scaling: scale the rotary positions for longer contexts: "yarn:4" or "linear:4"; adapters remember it
    revision, trust_remote_code: as in transformers, for hub ids

    Warns about linears that stay as they are because of their sizes. Raises ConfigError for settings that do not fit
    each other, the base or the machine; LorakitError if the base cannot be loaded or the quantizer's package is
    missing.
    """
    import torch

    from .device import choose_device, choose_dtype, device_named, precision_named

    compute = precision_named(compute_dtype) if isinstance(compute_dtype, torch.dtype) else compute_dtype
    how = Quantization(quantize=quantize, double=double, compute_dtype=compute)
    where = device_named(device) if device is not None else choose_device().value
    own = dtype if isinstance(dtype, torch.dtype) else choose_dtype(dtype, where).value
    return load_model(str(path), own, where, revision, trust_remote_code, how, kernel, rope_scaling)


def load_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    kernel: str | None = None,
    rope_scaling: str | None = None,
) -> Any:
    """Load a causal or seq2seq LM onto `device`, in eval mode. Raises LorakitError, also where weights are missing.

    `quantization`: how to quantize it while loading; None: as its checkpoint is. `kernel`, `rope_scaling`: as for
    `load_base`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = load_config(name, revision, trust_remote_code, rope_scaling)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options = storage_options(
        quantization or Quantization(),
        name,
        config,
        lambda: auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code),
        dtype,
        device,
        kernel=kernel,
    )
    if rope_scaling is not None:
        options.setdefault("config", config)
    model, info = from_pretrained(
        auto_class,
        name,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers initialises them at random and only warns
        raise LorakitError(
            f"'{name}' lacks weights that its {type(model).__name__} needs: {listing(missing, 3)}\n"
            "  expected a complete language model"
        )
    if rope_scaling is not None:
        setattr(model, SCALED, rope_scaling)
    return ready(model, device, "quantization_config" in options)


def storage_options(how: Quantization, name: str, config: Any, *rest: Any, kernel: str | None = None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for quantized weights: to quantize them now (see
    `quantize.loading_options`), or to read GPTQ's and AWQ's with our own modules.
    """
    options = loading_options(how, name, config, *rest)
    storage = storage_of(config)
    packed = storage is not None and storage.method in ("gptq", "awq")
    if kernel is not None:
        check_kernel(kernel, name, packed)
    elif packed:
        from .packed import own_config

        options["config"] = own_config(config)
    return options


def ready(model: Any, device: torch.device, quantized_now: bool) -> Any:
    """Move a loaded model to its device, in eval mode. `quantized_now`: its weights were quantized while loading."""
    from .int8_forward import evaluate_as_trained
    from .release import release_files

    evaluate_as_trained(model)
    model.to(device).eval()
    if quantized_now:
        release_files(model)
    return model


def from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """Call `auto_class.from_pretrained` on the base called `name`; options that are None are left out.

    Raises LorakitError, with the reason, for whatever goes wrong.
    """
    path = model_path(name)
    local = Path(path).is_dir()
    if local:
        options |= {"local_files_only": True, "revision": None}
    else:
        check_hub(name, EXPECTED)
    if not local and out_of_reach() is not None:
        options |= {"local_files_only": True}  # from the cache; the library would retry for half a minute
    try:
        with _quietly(local):
            return auto_class.from_pretrained(path, **{k: v for k, v in options.items() if v is not None})
    except LorakitError:  # from our own reader of packed weights
        raise
    # tokenizers raises bare Exceptions, damaged files cause KeyError, TypeError, AttributeError
    except Exception as error:
        stands_in = next(filter(None, map(not_the_file, sorted(Path(path).iterdir()))), None) if local else None
        if stands_in is not None:
            raise LorakitError(f"cannot load '{name}' with {auto_class.__name__}: {stands_in}") from error
        reason = next(iter(str(error).strip().splitlines()), "")
        readable = isinstance(error, OSError | ValueError | RuntimeError | ImportError) or type(error) is Exception
        if not (readable and reason):
            reason = f"{type(error).__name__} {reason}".strip()
        expected = f"expected a {'complete ' if local else ''}model folder, a hub id, or '{EMBEDDED}'"
        if isinstance(error, ImportError):  # a quantized base, or a model's own code
            expected = "pip install 'lorakit[quant]'" if "bitsandbytes" in reason else "install what it needs"
        raise LorakitError(f"cannot load '{name}' with {auto_class.__name__}: {reason}\n  {expected}") from error


@contextmanager
def _quietly(local: bool) -> Iterator[None]:
    """Hide transformers' progress bar while it loads local files; downloads keep theirs."""
    from transformers.utils import logging

    hide = local and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()


def _looks_like_adapter(path: Path) -> str:
    if (path / "model_index.json").exists():
        return "; it is a diffusers pipeline (model_index.json): lorakit image generate and image train take it"
    is_adapter = (path / "adapter_config.json").exists()
    return "; it is an adapter (adapter_config.json): give its base as the model" if is_adapter else ""
