"""What live virtual tokens share: their vectors, trained themselves or computed by an encoder in training.

The encoder of an adapter that is not trained stays as a value beside it, on the CPU: the model needs its result alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...adapter.virtual_tokens import TITLES, VirtualTokens
from ...config import LoraConfig, encoder_of
from ...config.virtual_tokens import VirtualKind
from ...errors import AdapterError, TargetError
from ..updates.update import LiveUpdate, device_of, master_dtype
from .body import BodyLayer, Call
from .encoder import Encoder, encoder_from, new_encoder

if TYPE_CHECKING:
    from ..layer import LoraLayer


class VirtualUpdate(LiveUpdate):
    """One adapter's virtual tokens. `embeddings`: [n, width], None where an encoder computes them."""

    kind: ClassVar[VirtualKind]
    in_front: ClassVar[bool]  # whether they are inputs of the body, in front of the tokens' own
    counted = "tokens"
    lacks = (
        *("targets", "components", "exclude", "layers", "layers_pattern", "strict_targets", "packed", "init"),
        *("rank", "alpha", "dropout", "rslora", "rank_pattern", "alpha_pattern", "lora_plus"),
    )
    lacking = "trains virtual tokens alone"
    encoder: Encoder | None
    embeddings: nn.Parameter | None

    def __init__(self, embeddings: Tensor | None, encoder: Encoder | None, trainable: bool, kept: Mapping[str, Tensor]):
        super().__init__()
        own = None if embeddings is None else nn.Parameter(embeddings, requires_grad=trainable)
        self.register_parameter("embeddings", own)
        self.encoder, self._kept = encoder, dict(kept)
        self.rank = len(encoder.embedding.weight if encoder is not None else embeddings)  # type: ignore[arg-type]

    # What a kind defines

    @classmethod
    @abstractmethod
    def check_body(cls, layer: BodyLayer) -> None:
        """Raise TargetError for a body that cannot have these virtual tokens."""

    @classmethod
    @abstractmethod
    def sizes(cls, layer: BodyLayer) -> tuple[int, int, int, int]:
        """Return (dim of an encoder's input, width, layers, heads of keys and values) on this body."""

    @classmethod
    @abstractmethod
    def start(cls, layer: BodyLayer, config: LoraConfig, options: Mapping[str, Any]) -> Tensor:
        """Return new vectors [n, width], to be trained themselves."""

    @abstractmethod
    def put_in(self, layer: BodyLayer, call: Call) -> bool:
        """Put the virtual tokens in front of a call's tokens. Returns whether they are in its cache now."""

    @abstractmethod
    def taken_out(self, output: Any, call: Call) -> Any:
        """Return the output as that of the call's own tokens."""

    # What all share

    @property
    def network(self) -> str:
        """The encoder that computes them in training: "none", "mlp" or "lstm"."""
        return "none" if self.encoder is None else self.encoder.network

    def virtual(self) -> Tensor:
        """Return the vectors, [n, width], with a gradient in training."""
        return self.encoder() if self.encoder is not None else self.embeddings  # type: ignore[return-value]

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        body = _body(layer, name, cls.kind)
        cls.check_body(body)
        options = _options(body)
        dim, width, _, _ = cls.sizes(body)
        network = encoder_of(cls.kind, config)
        if network == "none":
            return cls(cls.start(body, config, options), None, trainable, {})
        hidden = config.encoder_size or dim
        n, layers, dropout = config.virtual_tokens, config.encoder_layers, config.encoder_dropout
        encoder = new_encoder(cls.kind, network, n, dim, width, hidden, layers, dropout, options)
        return cls(None, encoder.requires_grad_(trainable), trainable, {})

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Any, config: LoraConfig, trainable: bool) -> Self:
        body = _body(layer, name, cls.kind)
        cls.check_body(body)
        _, width, layers, heads = cls.sizes(body)
        own = (value.embeddings.shape[1], value.layers or layers, value.heads or heads)
        if own != (width, layers, heads):
            raise AdapterError(
                f"the adapter's virtual tokens do not fit this {type(body).__name__.removeprefix('Lora')}: they are of "
                f"width {own[0]}, for {own[1]} layers with {own[2]} heads; it has {width}, {layers} and {heads}"
            )
        options = _options(body)
        if trainable and value.encoder:
            encoder = encoder_from(cls.kind, value.encoder, config.encoder_dropout, options)
            return cls(None, encoder, trainable, {})
        options = options if trainable else {"device": options["device"]}
        embeddings = value.embeddings.detach().to(**options, copy=True)
        return cls(embeddings, None, trainable, value.encoder)

    def value(self, layer: LoraLayer) -> VirtualTokens:
        assert isinstance(layer, BodyLayer)
        _, _, layers, heads = self.sizes(layer)
        if self.encoder is None:
            assert self.embeddings is not None
            return VirtualTokens(self.kind, self.embeddings.detach(), layers, heads, self._kept)
        was_training = self.encoder.training
        self.encoder.eval()
        with torch.enable_grad():  # as training computes them: without gradients an LSTM has another kernel
            embeddings = self.encoder().detach()
        self.encoder.train(was_training)
        tensors = {name: t.detach() for name, t in self.encoder.state_dict().items()}
        return VirtualTokens(self.kind, embeddings, layers, heads, tensors)

    def shape_on(self, layer: LoraLayer) -> tuple[int, ...]:
        assert isinstance(layer, BodyLayer)
        return self.rank, self.sizes(layer)[1]

    def extra_repr(self) -> str:
        return f"{self.rank} virtual tokens"


def _options(body: BodyLayer) -> dict[str, Any]:
    """Return dtype and device of what is trained on this body."""
    embedding: Any = body.lora_embedding()
    return {"dtype": master_dtype(embedding), "device": device_of(embedding)}


def _body(layer: LoraLayer, name: str, kind: VirtualKind) -> BodyLayer:
    if not isinstance(layer, BodyLayer):
        raise TargetError(
            f"'{name}' is a {type(layer).__name__.removeprefix('Lora')}, and {TITLES[kind]} is for a model's body"
        )
    return layer
