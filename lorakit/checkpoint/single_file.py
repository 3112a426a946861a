"""Find each module's weight in a diffusion model's single file, which has the original code's names ("ldm").

    denoiser           model.diffusion_model.    the "ldm" names of names/*.json; or the bare denoiser, without the
                                                 prefix
    text encoders      sd1   cond_stage_model.transformer.          CLIP-L, transformers' names
                       sd2   cond_stage_model.model.                OpenCLIP-H
                       sdxl  conditioner.embedders.0.transformer.   CLIP-L, transformers' names
                             conditioner.embedders.1.model.         OpenCLIP-G
                       sd3, flux                                    text_encoders.{clip_l,clip_g,t5xxl}.transformer.,
                                                                    transformers' names

Several modules can share the rows of one tensor: q, k, v in `attn.qkv` or OpenCLIP's `attn.in_proj_weight`, with the
feed-forward in Flux's `linear1`. The rows are divided in the proportions of the published sizes (thirds; 1:1:1:4), so
other widths are read too. A 1x1 convolution may be stored as [out, in, 1, 1] or as [out, in] (SD2's `proj_in`).
Weights that a pipeline does not use are not listed: EMA weights (`model_ema.`), the projection and the last layer of
SD2's text encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..errors import LorakitError, listing
from ..formats.names import MODELS, PIPELINES, module_list

Shapes = Mapping[str, tuple[int, ...]]

DENOISER = ("model.diffusion_model.", "diffusion_model.", "")
TRANSFORMERS, OPEN_CLIP = "transformers", "open_clip"
# model -> text encoder -> every (prefix, naming) in use.
TEXT_ENCODERS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "sd1": {"text_encoder": (("cond_stage_model.transformer.", TRANSFORMERS),)},
    "sd2": {"text_encoder": (("cond_stage_model.model.", OPEN_CLIP), ("cond_stage_model.transformer.", TRANSFORMERS))},
    "sdxl": {
        "text_encoder": (("conditioner.embedders.0.transformer.", TRANSFORMERS),),
        "text_encoder_2": (
            ("conditioner.embedders.1.model.", OPEN_CLIP),
            ("conditioner.embedders.1.transformer.", TRANSFORMERS),
        ),
    },
    "sd3": {
        "text_encoder": (("text_encoders.clip_l.transformer.", TRANSFORMERS),),
        "text_encoder_2": (("text_encoders.clip_g.transformer.", TRANSFORMERS),),
        "text_encoder_3": (("text_encoders.t5xxl.transformer.", TRANSFORMERS),),
    },
    "flux": {
        "text_encoder": (("text_encoders.clip_l.transformer.", TRANSFORMERS),),
        "text_encoder_2": (("text_encoders.t5xxl.transformer.", TRANSFORMERS),),
    },
}
# transformers' name within a layer -> OpenCLIP's; the first three are rows of one tensor.
_PACKED = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
_IN_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
# Norms that give a shift and a scale: the original code has the shift first, diffusers the scale.
_CONTINUOUS_NORMS = ("norm_out.linear", "norm1_context.linear")

# Names that only these models have, after the denoiser's prefix.
_SIGNS = {
    "flux": ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mod.lin.weight", "txt_in.weight"),
    "sd3": ("joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight", "context_embedder.weight"),
    "unet": ("input_blocks.0.0.weight", "input_blocks.4.1.norm.weight", "out.2.weight"),
}
_QUANTIZED = (
    ".absmax",
    ".quant_map",
    "bitsandbytes__nf4",
    "bitsandbytes__fp4",
    ".scale_weight",
    ".weight_scale",
    "scaled_fp8",
    ".comfy_quant",
    ".qweight",
    ".wscales",
)
_ADAPTER = (
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_A.weight",
    ".lora_B.weight",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w1_a",
    ".lokr_w2",
    ".oft_blocks",
    ".lora_linear_layer.up.weight",
)
# Part of a tensor's name -> what a file with it is.
_OTHERS = {
    "double_stream_modulation_img.lin": "a Flux.2 model",
    "distilled_guidance_layer.": "a Chroma model",
    "individual_token_refiner.": "a HunyuanVideo model",
    "time_stack.": "a video model (Stable Video Diffusion)",
    "motion_modules.": "an AnimateDiff motion module",
    "double_layers.0.": "an AuraFlow model",
    "patchify_proj.": "an LTX video model",
    "input_hint_block.": "a ControlNet",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "text_model.encoder.layers.": "a text encoder alone",
    "DenseReluDense": "a text encoder alone (T5)",
    "resblocks.": "a text encoder alone (OpenCLIP)",
    "model.layers.": "a language model",
    "decoder.up.": "a VAE",
    "decoder.up_blocks.": "a VAE",
}
_DIFFUSERS = ("down_blocks.0.", "single_transformer_blocks.0.", "transformer_blocks.0.attn.to_q")


class WeightRows(NamedTuple):
    """The rows [start, stop) of a file's tensor that are one module's weight, and how their layout differs from it."""

    tensor: str
    start: int
    stop: int
    swapped: bool = False  # the second half of the module's rows comes first
    transposed: bool = False  # [in, out]: OpenCLIP's text_projection, a bare matrix


def model_of_file(shapes: Shapes) -> str:
    """Find the model of `names.MODELS` that a file's tensors (name -> shape) belong to. Raises LorakitError, with what
    the file looks like, if it is none of them.
    """
    for prefix in DENOISER:
        for family, signs in _SIGNS.items():
            if all(prefix + sign in shapes for sign in signs):
                _refuse_quantized(shapes, prefix)
                return _unet_of(shapes, prefix) if family == "unet" else family
    raise LorakitError(
        f"no diffusion checkpoint of one file: {_looks_like(shapes)}\n"
        f"  expected the original code's names of {', '.join(MODELS)}, such as "
        "model.diffusion_model.input_blocks.0.0.weight"
    )


def module_rows(model: str, shapes: Shapes) -> dict[str, WeightRows]:
    """Find the rows of all modules in the file, by name ("unet.conv_in", "text_encoder_2.text_projection").

    Raises LorakitError for a shared tensor whose rows cannot be divided among its modules.
    """
    found: dict[str, WeightRows] = {}
    for component in PIPELINES[model]:
        for name, rows in _rows_by_name(model, component, shapes):
            found.setdefault(f"{component}.{name}", rows)
    return found


def bias_rows(model: str, module: str, shapes: Shapes) -> WeightRows | None:
    """Return the rows of a module's bias: those of its weight, in another tensor. None if the file lacks the module or
    its bias. Raises LorakitError if the bias does not fit the weight.
    """
    component, _, name = module.partition(".")
    rows = (
        next((p for _, p in _rows_by_name(model, component, shapes, name)), None)
        if component in PIPELINES[model]
        else None
    )
    if rows is None or not rows.tensor.endswith("weight"):
        return None
    tensor = f"{rows.tensor.removesuffix('weight')}bias"  # weight -> bias, in_proj_weight -> in_proj_bias
    if tensor not in shapes:
        return None
    if shapes[tensor] != shapes[rows.tensor][:1]:
        raise LorakitError(f"'{tensor}' has shape {list(shapes[tensor])}; its weight has {list(shapes[rows.tensor])}")
    return rows._replace(tensor=tensor)


def _rows_by_name(
    model: str, component: str, shapes: Shapes, only: str | None = None
) -> Iterator[tuple[str, WeightRows]]:
    """Yield (name within the component, rows) of all modules, or of `only` one. The first pair of a name counts."""
    listed = module_list(PIPELINES[model][component].listed)
    if component not in TEXT_ENCODERS[model]:
        yield from _denoiser_rows(listed, shapes, only)
        return
    modules = [name for name in listed["modules"] if only in (None, name)]
    for prefix, naming in TEXT_ENCODERS[model][component]:
        for name in modules:
            rows = (
                _in_transformers(prefix, name, shapes)
                if naming == TRANSFORMERS
                else _in_open_clip(model, prefix, name, shapes)
            )
            if rows is not None:
                yield name, rows


def _denoiser_rows(listed: Mapping[str, Mapping], shapes: Shapes, only: str | None) -> Iterator[tuple[str, WeightRows]]:
    prefix = next((p for p in DENOISER if any(f"{p}{name}.weight" in shapes for name in listed["ldm"])), None)
    if prefix is None:
        return
    for name, modules in listed["ldm"].items():
        tensor = f"{prefix}{name}.weight"
        if tensor not in shapes or (only is not None and only not in modules):
            continue
        parts = [listed["modules"][module][0] for module in modules]
        rows, unit = _rows(tensor, shapes), sum(parts)
        if any(rows * part % unit for part in parts):
            raise LorakitError(
                f"'{tensor}' has {rows} rows; {listing(modules)} cannot share them as {':'.join(map(str, parts))}"
            )
        start = 0
        for module, part in zip(modules, parts, strict=True):
            stop = start + rows * part // unit
            # Those of these norms that have six parts are of another kind.
            swapped = module.endswith(_CONTINUOUS_NORMS) and shapes[tensor][1:] == (rows // 2,)
            if only in (None, module):
                yield module, WeightRows(tensor, start, stop, swapped)
            start = stop


def _in_transformers(prefix: str, name: str, shapes: Shapes) -> WeightRows | None:
    """Find the rows, with or without the level `text_model.`, which early and late versions of transformers do not
    have.
    """
    for tensor in (f"{prefix}{name}.weight", f"{prefix}{name.removeprefix('text_model.')}.weight"):
        if tensor in shapes:
            return WeightRows(tensor, 0, _rows(tensor, shapes))
    return None


def _in_open_clip(model: str, prefix: str, name: str, shapes: Shapes) -> WeightRows | None:
    if name == "text_projection":
        return _projection(prefix, shapes) if model != "sd2" else None
    part, of = 0, 1
    if name == "text_model.final_layer_norm":
        tensor = f"{prefix}ln_final.weight"
    else:
        layer, _, rest = name.removeprefix("text_model.encoder.layers.").partition(".")
        if rest in _PACKED:
            tensor, part, of = f"{prefix}transformer.resblocks.{layer}.attn.in_proj_weight", _PACKED[rest], 3
        else:
            tensor = f"{prefix}transformer.resblocks.{layer}.{_IN_LAYER[rest]}.weight"
    if tensor not in shapes:
        return None
    rows, uneven = divmod(_rows(tensor, shapes), of)
    if uneven:
        raise LorakitError(f"'{tensor}' has {shapes[tensor][0]} rows; expected q, k and v with equal rows")
    return WeightRows(tensor, part * rows, (part + 1) * rows)


def _projection(prefix: str, shapes: Shapes) -> WeightRows | None:
    for tensor, transposed in ((f"{prefix}text_projection", True), (f"{prefix}text_projection.weight", False)):
        if tensor in shapes:
            return WeightRows(tensor, 0, _rows(tensor, shapes), transposed=transposed)
    return None


def _rows(tensor: str, shapes: Shapes) -> int:
    if not shapes[tensor]:
        raise LorakitError(f"'{tensor}' is a scalar; expected a weight")
    return shapes[tensor][0]


def _unet_of(shapes: Shapes, prefix: str) -> str:
    """Tell "sd1", "sd2" and "sdxl" apart. SDXL has three levels and an embedding of sizes; SD1 and SD2 share their
    names, and differ in the text encoder and widths. Raises LorakitError for other UNets.
    """
    if any("time_stack." in name for name in shapes):
        raise LorakitError(
            f"not a diffusion checkpoint that an adapter can be merged into: it is {_OTHERS['time_stack.']}"
        )
    four_levels = f"{prefix}input_blocks.9.0.op.weight" in shapes
    if not four_levels and f"{prefix}label_emb.0.0.weight" in shapes:
        return "sdxl"
    if not four_levels or f"{prefix}input_blocks.1.1.norm.weight" not in shapes:
        what = (
            "it looks like the SDXL refiner or an upscaler" if four_levels else "its levels are none of these models'"
        )
        raise LorakitError(f"no UNet of sd1, sd2 or sdxl: {what}\n  an adapter has other modules than this file")
    if any(name.startswith("cond_stage_model.model.") for name in shapes):
        return "sd2"
    if any(name.startswith("cond_stage_model.transformer.") for name in shapes):
        return "sd1"
    width = shapes.get(f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())[-1:]
    if width in ((768,), (1024,)):
        return "sd1" if width == (768,) else "sd2"
    return "sd1" if len(shapes.get(f"{prefix}input_blocks.1.1.proj_in.weight", ())) == 4 else "sd2"


def _refuse_quantized(shapes: Shapes, prefix: str) -> None:
    found = [name for name in shapes if name.startswith(prefix) and name.endswith(_QUANTIZED)]
    if found:
        raise LorakitError(
            f"its weights are quantized ({listing(found, 2)}): a low-rank update added to rounded weights is mostly "
            "lost\n"
            "  merge into the unquantized checkpoint (fp16, bf16 or fp32), and quantize the result"
        )


def _looks_like(shapes: Shapes) -> str:
    if not shapes:
        return "it holds no tensors"
    if any(name.endswith(_ADAPTER) or name.startswith(("lora_unet_", "lora_te")) for name in shapes):
        return "it is an adapter; the checkpoint comes first, then the adapter"
    if any(name.startswith(_DIFFUSERS) for name in shapes):
        return (
            "it has diffusers' names, as one component of a pipeline; give the pipeline's folder (the one with "
            "model_index.json)"
        )
    if all(name.startswith(("first_stage_model.", "vae.")) for name in shapes):
        return "it is a VAE"
    other = next((what for sign, what in _OTHERS.items() if any(sign in name for name in shapes)), None)
    return f"it is {other}" if other else f"its tensors are {listing(shapes, 3)}"
