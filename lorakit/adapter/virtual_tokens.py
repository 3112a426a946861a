"""Virtual tokens as a value: trained vectors in front of each row. They change no weight.

    prefix     keys and values of each layer        embeddings: [n, layers · 2 · heads · size], key before value
    prompt     input embeddings                     embeddings: [n, dim]
    p_tuning   input embeddings from an encoder     embeddings: [n, dim]

Li & Liang 2021; Lester et al. 2021; Liu et al. 2021. `heads` are those of keys and values, of which grouped-query
attention has fewer. The layout is that of PEFT's `prompt_embeddings`.

A network that computed them in training (`encoder`) is kept with them, so that training can go on; what the model gets
is `embeddings` alone. In an adapter they stand under the name `BODY`, by which transformers' models have the part below
their heads: `model.base_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..config.virtual_tokens import VirtualKind
from ..errors import AdapterError
from .checks import check_tensors
from .update import Read, Rows, Update

if TYPE_CHECKING:
    from .lora import FactorShapes

BODY = "base_model"
TITLES: Mapping[VirtualKind, str] = {"prefix": "prefix tuning", "prompt": "prompt tuning", "p_tuning": "P-tuning"}
_ENCODER = "encoder."


@dataclass(frozen=True)
class VirtualTokens(Update):
    """`layers`, `heads`: of the base's keys and values; 0 where a file of prompts does not say. `encoder`: the tensors
    of the network that computed the embeddings, by PEFT's names; empty without one.
    """

    kind: VirtualKind
    embeddings: Tensor
    layers: int = 0
    heads: int = 0
    encoder: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        return self.kind

    @property
    def rank(self) -> int:
        """The number of virtual tokens."""
        return self.embeddings.shape[0]

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def is_matrix(self) -> bool:
        return False

    @property
    def changes_weight(self) -> bool:
        return False

    @property
    def parameters(self) -> int:
        """The number of elements of the embeddings, without their encoder's."""
        return self.embeddings.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"embeddings": self.embeddings, **{_ENCODER + name: t for name, t in self.encoder.items()}}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> VirtualTokens:
        encoder = {name: change(_ENCODER + name, t) for name, t in self.encoder.items()}
        return replace(self, embeddings=change("embeddings", self.embeddings), encoder=encoder)

    def check(self, module: str) -> None:
        """AdapterError unless the tensors are finite and the embeddings divide into the layers' keys and values."""
        check_tensors(module, {"embeddings": self.embeddings})
        check_tensors(module, {_ENCODER + name: t for name, t in self.encoder.items()}, axes=1)
        where, width = f"virtual tokens of '{module}'", self.embeddings.shape[-1]
        if self.embeddings.dim() != 2:
            raise AdapterError(f"{where}: embeddings {list(self.embeddings.shape)}; expected [tokens, width]")
        if self.kind == "prefix" and (self.layers < 1 or self.heads < 1 or width % (2 * self.layers * self.heads)):
            raise AdapterError(
                f"{where}: their width is {width}, which does not divide into keys and values of {self.layers} layers "
                f"with {self.heads} heads"
            )

    def described(self) -> str:
        """Describe them in a sentence, for people."""
        what = f"{self.rank} virtual tokens ({TITLES[self.kind]})"
        width = self.embeddings.shape[1]
        where = (
            f"keys and values of {self.layers} layers, {self.heads} heads each"
            if self.kind == "prefix"
            else f"input embeddings of width {width}"
        )
        trained = sum(t.numel() for t in self.encoder.values())
        encoder = f"; their encoder, for further training, has {trained:,}" if trained else ""
        return f"{what}: {where}, {self.parameters:,} parameters{encoder}"

    def unmergeable(self) -> str:
        return (
            "stands for virtual tokens, which are inputs and change no weight, so they cannot be merged\n"
            f"  keep the adapter unmerged; of LoRA with virtual tokens, adapter.prune(['{BODY}']) is the LoRA alone"
        )

    def is_zero(self) -> bool:
        """Never: also a vector of zeros is attended to."""
        return False

    def times(self, weight: float, module: str) -> VirtualTokens:
        raise self._no_change()

    # There is no ΔW

    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.embeddings.shape)

    def delta(self, shape: tuple[int, ...] | None = None) -> Tensor:
        raise self._no_change()

    def factor_shapes(self, module: str) -> FactorShapes:
        raise self._no_change()

    def layout(self, shape: tuple[int, ...], file_transposed: bool = False, conv1d: bool = False) -> bool | None:
        return None

    def rows(
        self, shape: tuple[int, ...], transposed: bool = False, weight: float = 1.0, read: Read | None = None
    ) -> Rows:
        raise self._no_change()

    def output_tensors(self) -> dict[str, Tensor] | None:
        return None

    def _no_change(self) -> AdapterError:
        return AdapterError(
            f"{TITLES[self.kind]} changes no weight: its virtual tokens cannot be scaled, added, cut or merged\n"
            f"  of LoRA with virtual tokens, adapter.prune(['{BODY}']) is the LoRA alone"
        )
