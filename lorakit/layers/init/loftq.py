"""LoftQ (Li et al. 2023) with one iteration: start from what quantization lost.

    s · B A = the r largest singular values of W - Q(W)        W: before quantization, Q(W): the base's weight

Nothing is subtracted: at the start, base and adapter together are closer to the unquantized model than the base is. So
the adapter is right on this quantized base only. The paper's further iterations quantize W - s · B A again, which would
make another base; with a base as it is there is one iteration (as in PEFT's replace_lora_weights_loftq).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...config import LoraConfig
from ...errors import ConfigError, TargetError
from .matrix import Matrix
from .start import LINEAR, Evidence, Gathered, Part, Start
from .svd import first, halves


class Loftq(Start):
    """The r largest singular values of the quantization error."""

    kinds = LINEAR
    needs_originals = True

    def gather(self, matrices: Mapping[str, Matrix], config: LoraConfig, evidence: Evidence) -> Gathered:
        """Find the quantized modules' weights before quantization. The others lost nothing: theirs is a random start.

        Raises ConfigError if no module is quantized.
        """
        assert evidence.original is not None
        found = {name: original for name in matrices if (original := evidence.original(name)) is not None}
        if not found:
            raise ConfigError(
                "init='loftq' starts from what quantization lost, and none of the modules to adapt is quantized\n"
                "  load the base quantized (lorakit.load_base(path, quantize='nf4')), or use another init"
            )
        return Gathered(config, found)

    def factors(self, part: Part, found: Any) -> tuple[Tensor, Tensor]:
        part.check_rank(part.rank)
        W, quantized = found, part.matrix.read()
        if W.shape != quantized.shape:
            raise TargetError(
                f"the originals have a weight of {list(W.shape)} for '{part.name}'; the base's is "
                f"{list(quantized.shape)}\n  give the checkpoint that was quantized"
            )
        error = (W.to(quantized) - quantized)[part.rows]
        return halves(first(error, part.rank), part.scale)


START = Loftq()
