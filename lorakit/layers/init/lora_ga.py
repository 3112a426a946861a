"""LoRA-GA (Wang et al. 2024): start so that the first step changes W as full fine-tuning's would.

    G = U S Vᵀ        the gradient of W [out, in·k] in the first batches, on average

    A₀ = out^¼ / √γ · rows 1 to r of Vᵀ        B₀ = out^¼ / √γ · columns r+1 to 2r of U        γ = 16

s · B₀ A₀ is subtracted. The scale is the paper's "stable" one (section 3.3), with which neither the forward nor the
backward grows with the sizes; as the paper has it, s should not depend on the rank's size either: use `rslora`. (PEFT's
multiplies B by the singular values too, and only B by the factor.)

A gradient is computed from a module's input and its output's gradient, so a quantized weight has one too, and no
parameter needs `requires_grad`. No more than `GRADIENT_BYTES` of them exist at once: a model with more goes through the
batches several times, some of its modules each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...config import LoraConfig
from ...errors import StateError, listing
from .batches import FirstBatches, input_of
from .matrix import Matrix
from .start import WITH_CONV, Evidence, Gathered, Part, Start
from .svd import first, is_finite

GAMMA = 16
GRADIENT_BYTES = 1 << 30


class LoraGa(Start):
    """A and B from the gradient of W."""

    kinds = WITH_CONV
    subtracted = True
    needs_batches = True

    def gather(self, matrices: Mapping[str, Matrix], config: LoraConfig, evidence: Evidence) -> Gathered:
        """Compute the singular vectors of each module's gradient. Raises StateError for a module without one."""
        assert evidence.batches is not None
        found = {}
        for group in _groups(matrices, GRADIENT_BYTES):
            gradients = _gradients(group, evidence.batches)
            missing = [m for m in group if m not in gradients]
            if missing:
                raise StateError(
                    f"the loss of the first {len(evidence.batches)} batches does not depend on {len(missing)} of the "
                    f"modules to adapt, so init='lora_ga' has no gradient of them: {listing(missing, 3)}\n"
                    "  give more batches (LoraConfig.init_batches), or leave these modules out (exclude)"
                )
            for m in group:
                parts = [Part(m, group[m], rows, config.rank_of(m), 1.0) for rows in group[m].adapted_rows]
                found[m] = {part.rows.start: _factors(part, gradients[m]) for part in parts}
                del gradients[m]
        return Gathered(config, found)

    def factors(self, part: Part, found: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return found[part.rows.start]


def _factors(part: Part, gradient: Tensor) -> tuple[Tensor, Tensor]:
    G, r = gradient[part.rows], part.rank
    part.check_rank(2 * r, " of init='lora_ga', which needs twice as many")
    if not is_finite(G) or not G.any():
        what = "zero" if is_finite(G) else "not finite"
        raise StateError(
            f"the gradient of '{part.name}' in the first batches is {what}, so init='lora_ga' cannot start from it\n"
            "  check the batches and their loss, or leave the module out (exclude)"
        )
    svd, size = first(G, 2 * r), G.shape[0] ** 0.25 / GAMMA**0.5
    # Copies: views would keep the other half, and U and V would be as large as they are wide.
    return (size * svd.Vt[:r]).clone(), (size * svd.U[:, r : 2 * r]).clone()


def _groups(matrices: Mapping[str, Matrix], most: int) -> Iterator[dict[str, Matrix]]:
    """Divide the modules so that the gradients of each group have `most` bytes, or it is a single module."""
    group: dict[str, Matrix] = {}
    size = 0
    for name, matrix in matrices.items():
        own = 4 * matrix.shape[0] * matrix.shape[1]
        if group and size + own > most:
            yield group
            group, size = {}, 0
        group[name] = matrix
        size += own
    if group:
        yield group


def _gradients(matrices: Mapping[str, Matrix], batches: FirstBatches) -> dict[str, Tensor]:
    """Return the gradient of each module's W, summed over the batches: [out, in·k]."""
    sums: dict[str, Tensor] = {}

    def hook_of(name: str, matrix: Matrix) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            x = input_of(name, args, y).detach()
            if not y.requires_grad:
                y = y.detach().requires_grad_()  # nothing before it has gradients: start here
            if y.is_leaf or y._is_view():
                y = y.clone()  # a model may write into an output, which autograd allows for neither of these

            def add(g: Tensor) -> None:
                own = matrix.gradient(x, g)
                sums[name] = sums[name].add_(own) if name in sums else own

            y.register_hook(add)
            return y

        return hook

    handles = [matrix.module.register_forward_hook(hook_of(name, matrix)) for name, matrix in matrices.items()]
    try:
        batches.backward()
    finally:
        for handle in handles:
            handle.remove()
    return sums


START = LoraGa()
