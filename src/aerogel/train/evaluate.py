"""Scoring a model: accuracy of a classifier, retrieval of an encoder, perplexity of a language
model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.train.batches import take

OnScore = Callable[[int, int], None]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 250,
    limit: int | None = None,
    on_progress: OnScore | None = None,
) -> dict[str, float]:
    """Score a model on `dataset.test`, in evaluation mode; several processes share the work.

    Args:
        model: the network; its mode is restored afterwards.
        dataset: a data set whose `task` is "classification", or "distillation" with `queries`,
            `documents` and `relevant` in its test split.
        batch_size: samples at a time.
        limit: score the first `limit` samples only; None scores all.
        on_progress: called as `(samples_done, samples_total)` by the first process.

    Returns:
        "accuracy" and "loss", or "recall@1", "recall@10" and "mrr"; all in [0, 1] but the loss.

    Raises:
        ValueError: unknown task.
    """
    scores = {"classification": _classification, "distillation": _retrieval}
    if dataset.task not in scores:
        raise ValueError(f"task {dataset.task!r} is unknown; expected one of {sorted(scores)}")
    was_training = model.training
    model.eval()
    try:
        return scores[dataset.task](model, dataset.test, batch_size, limit, on_progress)
    finally:
        model.train(was_training)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 4,
    on_progress: OnScore | None = None,
) -> float:
    """Perplexity of a causal language model: exp of the mean loss of each next token.

    Windows are scored on their own, without what precedes them, as the papers on pruning language
    models do; short windows therefore give higher figures than long ones.

    Args:
        model: token ids (batch, length) to an output with `logits` (batch, length, vocabulary), or
            to the logits; its mode is restored afterwards.
        windows: (windows, length) int64 token ids, length >= 2.
        batch_size: windows at a time.
        on_progress: called as `(windows_done, windows_total)` by the first process.

    Raises:
        ValueError: windows of another shape, or none.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"windows has shape {tuple(windows.shape)}, expected (windows >= 1, length >= 2)"
        )
    device = next(model.parameters()).device
    total, was_training = len(windows), model.training
    loss = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    try:
        for share in _shares(total, batch_size, on_progress):
            ids = windows[share].to(device)
            output = model(ids)
            logits = getattr(output, "logits", output)[:, :-1].flatten(0, 1)  # [tokens, vocabulary]
            loss += F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum")
    finally:
        model.train(was_training)
    _sum_over_processes(loss)
    return float(torch.exp(loss / (total * (windows.shape[1] - 1))))


def _classification(
    model: nn.Module, split: Any, batch_size: int, limit: int | None, on_progress: OnScore | None
) -> dict[str, float]:
    device = next(model.parameters()).device
    total = len(split) if limit is None else min(limit, len(split))
    # float64 sums: exact counts, and the same loss to many digits however the work is shared.
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for indices in _shares(total, batch_size, on_progress):
        inputs, target = take(split, indices, device)
        assert target is not None
        logits = model(*inputs)
        sums[0] += (logits.argmax(-1) == target).sum()
        sums[1] += F.cross_entropy(logits, target, reduction="sum")
    _sum_over_processes(sums)
    return {"accuracy": float(sums[0] / total), "loss": float(sums[1] / total)}


def _retrieval(
    model: nn.Module, split: Any, batch_size: int, limit: int | None, on_progress: OnScore | None
) -> dict[str, float]:
    count = len(split) if limit is None else min(limit, len(split))
    documents = _embed(model, split.documents, len(split.documents), batch_size, on_progress)
    queries = _embed(model, split.queries, count, batch_size, on_progress)
    relevant = split.relevant[:count].to(queries.device)
    scores = queries @ documents.T  # [queries, documents]
    own = scores.gather(1, relevant[:, None])
    # Ties count against the model, so that a constant encoder scores nothing.
    rank = (scores >= own).sum(1).double()
    return {
        "recall@1": float((rank <= 1).double().mean()),
        "recall@10": float((rank <= 10).double().mean()),
        "mrr": float((1 / rank).mean()),
    }


def _embed(
    model: nn.Module, split: Any, total: int, batch_size: int, on_progress: OnScore | None
) -> Tensor:
    """Unit embeddings (total, C) of a text split, on every process."""
    device = next(model.parameters()).device
    order = _by_length(split, total)
    table: Tensor | None = None
    for share in _shares(total, batch_size, on_progress):
        rows = order[share]
        inputs, _ = take(split, rows, device)
        vectors = F.normalize(model(*inputs), dim=-1)
        if table is None:
            table = vectors.new_zeros(total, vectors.shape[1])
        table[rows.to(device)] = vectors
    if table is None:  # more processes than batches
        inputs, _ = take(split, order[:1], device)
        table = torch.zeros_like(model(*inputs)[:1]).expand(total, -1).clone()
    _sum_over_processes(table)
    return table


def _by_length(split: Any, total: int) -> Tensor:
    """Texts of like length share a batch, which then needs little padding."""
    lengths = getattr(split, "lengths", None)
    if lengths is None:
        return torch.arange(total)
    return lengths[:total].argsort(stable=True)


def _shares(total: int, batch_size: int, on_progress: OnScore | None) -> Any:
    """This process's batches of indices 0..total-1."""
    rank, world = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    for start in range(rank * batch_size, total, world * batch_size):
        stop = min(start + batch_size, total)
        yield torch.arange(start, stop)
        if on_progress is not None and rank == 0:
            on_progress(stop, total)


def _sum_over_processes(x: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
