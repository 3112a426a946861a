"""Pictures and captions as a pipeline's denoiser sees them: encoded, cached on disk, and collated into a batch.

picture -> latents      by the autoencoder, kept in float32
caption -> arguments    by the text encoders; while one of them is trained, captions stay text
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...bases.device import choose_device, choose_dtype
from ...bases.load_pipeline import load_pipeline
from ...bases.native_size import FALLBACK, MULTIPLE, native_size
from ...bases.pipeline import PipelineModel, as_module, is_text_encoder
from ...config import RunSettings, part
from ...data.pictures.cache import TensorCache, caption_key, picture_key, weights_hash
from ...data.pictures.item import Drawn, PictureItem
from ...errors import ConfigError, LorakitWarning
from ...generate.eval_mode import evaluating
from ...generate.pictures.call import cut_prompts
from ...nondefault import nondefault
from ..task import Data
from .fit import check_fit
from .latents import encode_pictures, latent_scale, size_multiple
from .loss import losses
from .packing import layout_of
from .pictures import read_data
from .prompts import batch_prompts, encode_prompts, encoding_of, size_arguments, text_prompts
from .settings import DiffusionSettings
from .tokens import AddedTokens, NewToken, add_tokens, trainable_tokens

if TYPE_CHECKING:
    from ..text_to_image import TextToImageSettings

CACHE = "cache"  # in the run's folder


@dataclass(frozen=True)
class PictureRow:
    """A picture as an epoch sees it: an item with what is drawn of it. It is a training item itself."""

    item: PictureItem
    drawn: Drawn

    def in_epoch(self, seed: int, epoch: int) -> PictureRow:
        """Return the picture as another epoch sees it."""
        return replace(self, drawn=self.item.drawn(seed, epoch))

    @property
    def plain(self) -> PictureRow:
        """The picture as evaluation sees it."""
        return replace(self, drawn=self.item.plain)

    @property
    def caption(self) -> str:
        return self.item.caption

    @property
    def split_key(self) -> str:
        return self.item.split_key

    @property
    def size(self) -> int:
        return self.item.size

    @property
    def group(self) -> tuple[int, int]:
        return self.item.group

    @property
    def weight(self) -> int:
        return self.item.weight

    @property
    def where(self) -> str:
        return self.item.where

    @property
    def is_prior(self) -> bool:
        return self.item.is_prior

    def digest(self) -> bytes:
        return self.item.digest()


class Pictures:
    """A run's pipeline, and what it makes of pictures and captions."""

    def __init__(self, config: RunSettings, settings: TextToImageSettings):
        self.config, self.settings = config, settings
        self.diffusion = part(settings, DiffusionSettings)
        folder = {"auto": Path(config.out) / CACHE, "none": None}.get(settings.cache, Path(settings.cache))
        self.cache = None if folder is None else TensorCache(folder)
        self.added: AddedTokens | None = None  # once the pipeline is loaded
        self._loaded: dict[str, Any] = {}  # the pipeline, shared with `for_run`'s
        self._hashes: dict[str, str] = {}

    def for_run(self, config: RunSettings, settings: TextToImageSettings) -> Pictures:
        """Return the same pipeline with another run's settings and cache."""
        other = type(self)(config, settings)
        other._loaded, other.added, other._hashes = self._loaded, self.added, self._hashes
        return other

    def data(self) -> Data:
        """Read the run's pictures. Raises DataError for those that cannot be used."""
        return read_data(self.config, self.settings, self)

    @property
    def pipe(self) -> Any:
        """The run's pipeline, loaded when it is first asked for. Raises LorakitError if it cannot be loaded."""
        if "pipe" not in self._loaded:
            config, device = self.config, choose_device().value
            dtype = choose_dtype(config.precision, device).value
            self._loaded["pipe"] = load_pipeline(config.model, dtype, device, config.revision)
        return self._loaded["pipe"]

    def sizes(self) -> tuple[int, int]:
        """Return the side of the pictures that the pipeline was made for, and what all sides must be multiples of.

        They come from config files where these are on this disk, without loading the pipeline.
        """
        known = native_size(self.config.model, self.config.revision)
        resolution, multiple = known or (resolution_of(self.pipe), size_multiple(self.pipe))
        return resolution, math.lcm(multiple, MULTIPLE)

    def load(self) -> PipelineModel:
        """Return the pipeline as one model, which is on its device already."""
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        if self.settings.new_tokens:
            torch.manual_seed(self.config.seed)
            vectors = self.settings.token_vectors
            new = {token: NewToken(vectors, start or None) for token, start in self.settings.new_tokens.items()}
            self.added = add_tokens(self.pipe, new)
        model: PipelineModel = as_module(self.pipe)
        return model

    def trainable_tokens(self) -> dict[str, list[int | str]]:
        """Return the new tokens' ids, by the name of their embedding."""
        assert self.added is not None
        return trainable_tokens(self.pipe, self.added)

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder has trained parameters, so that its results cannot be cached."""
        return any(p.requires_grad for _, encoder in self._encoders() for p in encoder.parameters())

    def prepare(self, model: PipelineModel, items: Iterable[PictureRow]) -> None:
        """Encode a picture of each size, and find out how the pipeline takes its latents. Warns of captions that are
        cut. Raises TrainError for a pipeline that cannot be trained, DataError for a picture that cannot be encoded,
        ConfigError for settings that do not fit the pipeline.
        """
        check_fit(model, self.diffusion)
        rows = list(items)
        for row in {row.group: row for row in rows}.values():
            batch = self.collate([row.plain])
            self._find_layout(model, batch["latents"][0], batch["prompts"])
        self._warn_of_cut(row.caption for row in rows)

    def _find_layout(self, model: PipelineModel, latents: Tensor, prompts: Mapping[str, Any]) -> None:
        """Find out how the pipeline takes latents like these: [...], of one picture. Raises ConfigError for a guidance
        that its denoiser is not given.
        """
        device = next(model.parameters()).device
        layout = layout_of(model, latents[None].to(device), on_device(prompts, device))
        if nondefault(self.diffusion, ["guidance"]) and not layout.embedded:
            raise ConfigError(
                f"guidance: {type(self.pipe).__name__} is trained without guidance, which is for models that are given "
                "it as an input, such as Flux\n  remove guidance; sample_guidance is that of pictures drawn in training"
            )

    def _warn_of_cut(self, captions: Iterable[str]) -> None:
        """Warn of captions that are longer than a text encoder reads."""
        lines = cut_prompts(self.pipe, list(dict.fromkeys(captions)))
        if lines:
            more = f"\n  and so for {len(lines) - 1:,} more" if len(lines) > 1 else ""
            warnings.warn(f"{lines[0]}{more}", LorakitWarning, stacklevel=2)

    def collate(self, rows: Sequence[PictureRow]) -> dict[str, Any]:
        """Return a batch, on the CPU: `latents` [rows, ...], `prompts` (arguments of the pipeline's call), `weight`
        [rows], `of` (this object), and `mask` [rows, 1, H, W] if one of the rows has one.
        """
        batch: dict[str, Any] = {
            "latents": torch.stack([self.latents(row.item, row.drawn) for row in rows]),
            "prompts": self.prompts(rows),
            "of": self,
            "weight": torch.tensor([self.settings.prior_weight if row.is_prior else 1.0 for row in rows]),
        }
        masks = [row.item.mask_pixels(row.drawn) for row in rows]
        if any(mask is not None for mask in masks):
            full = torch.ones(1, rows[0].group[1], rows[0].group[0])
            batch["mask"] = torch.stack([full if mask is None else mask for mask in masks])
        return batch

    def losses(self, model: PipelineModel, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of each row of a batch: [rows]."""
        latents = batch["latents"]
        prompts = on_device(batch["prompts"], latents.device)
        return losses(model, latents, prompts, self.diffusion, batch.get("mask")) * batch["weight"]

    def latents(self, item: PictureItem, drawn: Drawn) -> Tensor:
        """Return a picture's latents, on the CPU. Raises DataError, naming it, if they are not finite."""

        def make() -> dict[str, Tensor]:
            return {"latents": encode_pictures(self.pipe, item.pixels(drawn)[None], [item.where])[0].cpu()}

        if self.cache is None:
            return make()["latents"]
        return self.cache.tensors(picture_key(item, drawn, self._hash("vae")), make, item.where)["latents"]

    def prompts(self, rows: Sequence[PictureRow]) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for the rows' captions."""
        sizes = [self._sizes(row) for row in rows]
        if self.trains_text:
            return text_prompts([row.drawn.caption for row in rows], sizes)
        return batch_prompts([{**self._encoded(row.drawn.caption), **own} for row, own in zip(rows, sizes)])

    def _encoded(self, caption: str) -> dict[str, Tensor]:
        def make() -> dict[str, Tensor]:
            with evaluating(as_module(self.pipe)):
                return {name: tensor.cpu() for name, tensor in encode_prompts(self.pipe, [caption])[0].items()}

        if self.cache is None:
            return make()
        return self.cache.tensors(caption_key(caption, self._hash("text")), make, f"caption '{caption}'")

    def _sizes(self, row: PictureRow) -> dict[str, Any]:
        """Return SDXL's arguments for the size of the picture and its crop.

        The original size is the file's, so that a small picture that was enlarged is not taken for a sharp one; the
        crop is in pixels of the scaled picture.
        """
        left, top, right, _ = row.drawn.box
        width, height = row.group
        scale = width / (right - left)
        original = row.item.original[::-1]
        return size_arguments(self.pipe, original, (round(top * scale), round(left * scale)), (height, width))

    def _encoders(self) -> list[tuple[str, nn.Module]]:
        components = as_module(self.pipe).components
        return [(name, module) for name, module in components.items() if is_text_encoder(name)]

    def _hash(self, kind: str) -> str:
        if kind not in self._hashes:
            components = self.pipe.components.items()
            tokenizers = [t for name, t in components if name.startswith("tokenizer") and t is not None]
            parts = [self.pipe.vae] if kind == "vae" else [*(e for _, e in self._encoders()), *tokenizers]
            how = "" if kind == "vae" else encoding_of(self.pipe)
            self._hashes[kind] = weights_hash(*parts) + how
        return self._hashes[kind]


def resolution_of(pipe: Any) -> int:
    """Return the side in pixels of the pictures that a pipeline was made for."""
    for name in ("unet", "transformer"):
        side = getattr(getattr(getattr(pipe, name, None), "config", None), "sample_size", None)
        if isinstance(side, int):
            return side * latent_scale(pipe)
    return FALLBACK


def on_device(prompts: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors among a call's arguments."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return [moved(each) for each in value] if isinstance(value, list) else value

    return {name: moved(value) for name, value in prompts.items()}
