"""SparseGPT's column sweep: prune a weight and let the kept entries make up for it.

The layer's squared output error is a quadratic form with the Hessian H = 2 E[x x^T]. Removing one
weight and re-fitting the rest of its row optimally costs w_j^2 / [H^-1]_jj; going through the
columns from left to right and only ever re-fitting the columns still to come lets all rows share
one Cholesky factor of H^-1.

Reference: Frantar & Alistarh, "SparseGPT", arXiv 2301.00774; Hassibi et al., "Optimal Brain
Surgeon", 1993.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.arguments import check_count, check_number
from aerogel.sparsity.patterns import NM, Pattern, Unstructured
from aerogel.sparsity.scores import OBS_DAMPING, inverse_cholesky
from aerogel.sparsity.topk import pruned_count, require_finite, topk_mask, topk_rows

SPARSEGPT_BLOCK = 128
# ATen runs elementwise work of up to this many elements on the calling thread.
SERIAL_ELEMENTS = 1 << 15


def sparsegpt_weight(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: Pattern | None = None,
    *,
    block: int = SPARSEGPT_BLOCK,
    damp: float = OBS_DAMPING,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """SparseGPT on one weight: optimal-brain-surgeon updates column by column.

    Inputs that were always zero are pruned first and take no part in the repair. The authors' code
    differs in two things: unstructured, it prunes one weight more in every block (all scores up to
    the one at index ``int(sparsity * n)``), and it zeroes every weight of an input that was always
    zero. With its count made exact, masks are the same and weights equal within 1e-6.

    Args:
        weight: (out, in/groups, *kernel), any floating dtype.
        hessian: (F, F), or (g, F, F) for a grouped convolution, F = in/groups * prod(kernel).
        sparsity: fraction of zeros of the whole weight, ignored by N:M.
        pattern: None (unstructured) or `NM` along the inputs.
        block: columns decided together.
        damp: share of the mean diagonal added to the Hessian.
        name: named in errors.

    Returns:
        (new weight, bool mask), of the weight's shape; exactly floor(sparsity * numel) are pruned.

    Reference: arXiv 2301.00774, algorithm 1.
    """
    shape = pattern if pattern is not None else Unstructured()
    check_sparsegpt_options(shape, block, damp)
    shape.validate(weight.shape, name)
    require_finite(weight, name)
    nm = shape if isinstance(shape, NM) else None
    if nm is not None and nm.pad and weight.ndim > 2 and weight.shape[1] % nm.m:
        raise ValueError(f"{name}: padded {nm} groups of a convolution are not supported here")
    hessians = hessian if hessian.ndim == 3 else hessian[None]
    new, masks = [], []
    for part, local in zip(weight.chunk(len(hessians)), hessians, strict=True):
        # Groups of N:M run along channels at one kernel position: make channels the inner axis.
        order = _channels_innermost(part.shape) if nm is not None else None
        matrix = part.flatten(1).float()
        if order is not None:
            matrix, local = matrix[:, order], local[order][:, order]
        repaired, mask = _obs(matrix, local.to(matrix.device), sparsity, nm, block, damp, name)
        if order is not None:
            back = order.argsort()
            repaired, mask = repaired[:, back], mask[:, back]
        new.append(repaired.reshape(part.shape))
        masks.append(mask.reshape(part.shape))
    return torch.cat(new).to(weight.dtype), torch.cat(masks)


def _obs(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    nm: NM | None,
    block: int,
    damp: float,
    name: str,
) -> tuple[Tensor, Tensor]:
    """The column sweep on a float32 matrix (rows, columns); see `sparsegpt_weight`."""
    rows, columns = weight.shape
    upper = inverse_cholesky(hessian, damp, name)
    dead = hessian.diagonal() == 0
    live = weight.t().clone()  # [columns, rows]: one column of the weight is contiguous
    live[dead] = 0.0
    kept = torch.ones(columns, rows, dtype=torch.bool, device=weight.device)
    width = block if nm is None else max(nm.m, block - block % nm.m)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        local = upper[start:stop, start:stop]
        part, mask = live[start:stop], kept[start:stop]
        if nm is None:
            done = pruned_count(rows * start, sparsity, rounding="floor", min_keep=0)
            due = pruned_count(rows * stop, sparsity, rounding="floor", min_keep=0) - done
            score = (part / local.diagonal()[:, None]).square()
            mask.copy_(topk_mask(score.t(), score.numel() - due).t())
        errors = _sweep(part, mask, local, nm)
        live[stop:] -= upper[start:stop, stop:].t() @ errors
    new, kept = live.t().contiguous(), kept.t().contiguous()
    untouched = torch.where(kept, weight, torch.zeros((), device=weight.device))
    return torch.where(dead, untouched, new), kept


def _sweep(part: Tensor, mask: Tensor, upper: Tensor, nm: NM | None) -> Tensor:
    """Prune the columns of one block in order, pushing each error onto the columns to come.

    Args:
        part: (columns of the block, rows), changed in place.
        mask: same shape; read, or filled group by group for N:M.
        upper: the block's part of the Cholesky factor.
        nm: the pattern, None if `mask` is complete.

    Returns:
        (columns of the block, rows) scaled errors for the lazy update of later blocks.
    """
    errors = torch.zeros_like(part)
    columns, rows = part.shape
    step = _inner_columns(rows, nm)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        inner = slice(start, stop)
        errors[inner] = _prune_columns(part[inner], mask[inner], upper[inner, inner], nm)
        part[stop:] -= upper[inner, stop:].t() @ errors[inner]
    return errors


def _prune_columns(part: Tensor, mask: Tensor, upper: Tensor, nm: NM | None) -> Tensor:
    """`_sweep` over a few columns, one by one; returns their errors."""
    errors = torch.empty_like(part)
    diagonal = upper.diagonal()
    for j in range(len(part)):
        if nm is not None and j % nm.m == 0:
            group = slice(j, min(j + nm.m, len(part)))
            score = (part[group] / diagonal[group, None]).square().t().contiguous()
            mask[group] = topk_rows(score, min(nm.n, score.shape[1])).t()
        pruned = torch.where(mask[j], part[j], 0.0)
        errors[j] = (part[j] - pruned) / diagonal[j]
        part[j:].addr_(upper[j, j:], errors[j], alpha=-1.0)
        part[j] = pruned
    return errors


def _inner_columns(rows: int, nm: NM | None) -> int:
    """Columns updated one by one before the rest of the block follows in one product.

    So few that each update stays below the size at which torch wakes other threads: thousands of
    hand-overs cost more than they bring, on a busy machine ten times more.
    """
    step = max(1, SERIAL_ELEMENTS // max(rows, 1))
    return step if nm is None else max(nm.m, step - step % nm.m)


def _channels_innermost(shape: torch.Size) -> Tensor | None:
    if len(shape) <= 2:
        return None
    index = torch.arange(shape[1:].numel()).reshape(shape[1:])
    return index.movedim(0, -1).flatten()


def check_sparsegpt_options(pattern: Pattern, block: int, damp: float) -> None:
    if not isinstance(pattern, (Unstructured, NM)) or getattr(pattern, "axis", 1) != 1:
        raise ValueError(f"SparseGPT knows unstructured and N:M along inputs, not {pattern}")
    check_count("block", block)
    check_number("damp", damp, "(0, inf)")
