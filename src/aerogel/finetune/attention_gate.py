"""Training of attention gates: a frozen model's own attention maps teach small gates.

Paper: Gao et al., "SeerAttention", arXiv 2410.13276; the decoding gate: arXiv 2506.08889.

    selector = make_gates(model, block_size=64)
    distill_gates(model, selector, windows, steps=500)
    attach(model, selector)
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.attention import (
    AttentionContext,
    DensePlan,
    Plan,
    SeerAttentionSelector,
    Selector,
    add_calibration,
    attach,
    detach,
    load_selector,
    save_selector,
)
from aerogel.attention.calibration import OnProgress
from aerogel.attention.hooks import attention_layers
from aerogel.attention.seer_gate import SeerDecodeGate, SeerGate
from aerogel.attention.seerattention import Lesson
from aerogel.attention.selector_file import model_fingerprint

_SELECTION = (
    *("method", "threshold", "ratio", "budget", "last_block_dense", "force_diagonal"),
    "start_layer",
)
OnStep = Callable[[int, int, float], None]
"""Called as (steps done, steps in all, loss)."""


def make_gates(
    model: nn.Module,
    *,
    mode: Literal["prefill", "decode"] = "prefill",
    layers: list[int] | tuple[int, ...] | None = None,
    seed: int = 0,
    **options: Any,
) -> SeerAttentionSelector:
    """Untrained gates for a model.

    Args:
        model: a transformers model; nothing is changed in it.
        mode: as for `SeerAttentionSelector`.
        layers: which get a gate; default all.
        seed: of the gates' first weights.
        options: of `SeerAttentionSelector`, and of its gates (`SeerGate` or `SeerDecodeGate`).

    Raises:
        ValueError: an option is out of range, or the model has no such layer.
    """
    selection = {name: options.pop(name) for name in _SELECTION if name in options}
    facts = model_fingerprint(model)
    numbers = sorted({int(m.layer_idx) for m in attention_layers(model)})  # type: ignore[arg-type]
    chosen = numbers if layers is None else sorted(layers)
    if not chosen or not set(chosen) <= set(numbers):
        raise ValueError(f"layers={layers}: expected some of the model's, {numbers}")
    kind = SeerGate if mode == "prefill" else SeerDecodeGate
    options.setdefault("gate_dim", 128)
    rope = _rope(model, options["gate_dim"])
    if rope is None:
        options["rope_theta"] = None
    gates: dict[int, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in chosen:
            gate = kind(facts["q_heads"], facts["kv_heads"], facts["head_dim"], **options)
            if rope is not None:
                gate.inv_freq, gate.rope_scale = rope[0].clone(), rope[1].clone()
            gates[layer] = gate
    device = next(model.parameters()).device
    return SeerAttentionSelector(gates, mode=mode, **selection).to(device)


def _rope(model: nn.Module, gate_dim: int) -> tuple[Tensor, Tensor] | None:
    """Frequencies and scale of the model's rotary embedding for the gate's width."""
    modules = [m for m in model.modules() if hasattr(m, "inv_freq")]
    if not modules:
        return None
    rotary: Any = modules[0]
    config = copy.deepcopy(rotary.config)
    config.head_dim = gate_dim
    config.hidden_size = gate_dim * config.num_attention_heads
    made: Any = type(rotary)(config)
    turned = made.inv_freq.float()
    # A model that turns a part of its channels (GPT-NeoX) has a gate that turns that share.
    turned = nn.functional.pad(turned, (0, gate_dim // 2 - len(turned)))
    return turned, torch.tensor(float(getattr(made, "attention_scaling", 1.0)))


class _Teacher(Selector):
    """Attends to everything and hands every layer's call on."""

    slug = "gate-teacher"
    needs = frozenset({"pre_rope"})
    differentiable = True

    def __init__(self, hear: Callable[[AttentionContext], None]) -> None:
        super().__init__()
        self.hear = hear

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        self.hear(ctx)
        return DensePlan()


@contextlib.contextmanager
def _taught(model: nn.Module, hear: Callable[[AttentionContext], None]) -> Iterator[None]:
    attach(model, _Teacher(hear))
    try:
        yield
    finally:
        detach(model)


def distill_gates(
    model: nn.Module,
    selector: SeerAttentionSelector,
    windows: Tensor,
    *,
    steps: int = 500,
    batch_size: int = 1,
    lr: float = 1e-3,
    last_lr: float = 0.0,
    loss_scale: float = 10.0,
    warmup: int = 20,
    keep: bool = True,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[float]:
    """Trains gates on a model's attention maps; the model stays as it is.

    Args:
        model: a transformers model without an attached selector.
        selector: its gates are trained in place.
        windows: (windows, length) token ids, longer than a block.
        steps: of AdamW without weight decay.
        batch_size: windows a step.
        lr: largest learning rate; it falls as a cosine to `last_lr`.
        last_lr: the smallest; 1e-5 is the authors' for mode "decode".
        loss_scale: factor of the loss, which is summed over layers.
        warmup: steps of linear warm-up.
        keep: pooled inputs and targets of every window are kept, so that each goes through the
            model once; False for more text than memory holds.
        seed: of the order of the windows.
        on_step: progress.

    Returns:
        The loss of every step, without its scale.

    Raises:
        ValueError: windows of another shape or too short, or no steps.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] <= selector.block:
        raise ValueError(
            f"windows: shape {tuple(windows.shape)}, expected (windows, length) with more than "
            f"{selector.block} tokens each"
        )
    kept: dict[int, dict[int, Lesson]] = {}

    def lessons(number: int) -> dict[int, Lesson]:
        found = kept.get(number) or _lessons(model, selector, windows[number : number + 1])
        if keep:
            kept[number] = found
        return found

    return fit_gates(
        selector, lessons, len(windows), steps=steps, batch_size=batch_size, lr=lr, last_lr=last_lr,
        loss_scale=loss_scale, warmup=warmup, seed=seed, on_step=on_step,
    )  # fmt: skip


def fit_gates(
    selector: SeerAttentionSelector,
    lessons: Callable[[int], dict[int, Lesson]],
    count: int,
    *,
    steps: int = 500,
    batch_size: int = 1,
    lr: float = 1e-3,
    last_lr: float = 0.0,
    loss_scale: float = 10.0,
    warmup: int = 20,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[float]:
    """Trains gates on lessons, as `distill_gates` does on a model's.

    Args:
        selector: its gates are trained in place.
        lessons: the lessons of a piece of text by its number: per layer, `selector.lesson(...)`.
        count: pieces.
        steps: as for `distill_gates`, like the rest.
        batch_size: pieces a step.
        lr: largest learning rate.
        last_lr: the smallest.
        loss_scale: factor of the loss.
        warmup: steps of it.
        seed: of the order.
        on_step: progress.

    Raises:
        ValueError: no steps, or no pieces.
    """
    if min(steps, batch_size, count) < 1:
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, count={count}: expected at least 1"
        )
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    optimizer = torch.optim.AdamW(selector.parameters(), lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, warmup, lr, last_lr)
        optimizer.zero_grad()
        total = 0.0
        for _ in range(batch_size):
            order = order or torch.randperm(count, generator=draw).tolist()
            parts = [selector.lesson_loss(*lesson) for lesson in lessons(order.pop()).items()]
            loss = torch.stack(parts).sum() / batch_size
            (loss * loss_scale).backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
        if on_step is not None:
            on_step(step + 1, steps, total)
    return losses


def _rate(step: int, steps: int, warmup: int, lr: float, last: float) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return last + (lr - last) * (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def _lessons(model: nn.Module, selector: SeerAttentionSelector, ids: Tensor) -> dict[int, Lesson]:
    found: dict[int, Lesson] = {}

    def hear(ctx: AttentionContext) -> None:
        lesson = selector.lesson(ctx)
        if lesson is not None:
            found[ctx.layer_idx] = lesson

    was_training = model.training
    model.eval()
    try:
        with _taught(model, hear):
            base: Any = getattr(model, "base_model", model)
            base(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        model.train(was_training)
    return found


@contextlib.contextmanager
def gate_loss(
    model: nn.Module, selector: SeerAttentionSelector, *, detach_inputs: bool = True
) -> Iterator[Callable[[], Tensor]]:
    """The gates' loss beside a model's own, for fine-tuning both (as for longer contexts).

        with gate_loss(model, selector) as gates:
            loss = model(ids, labels=ids, use_cache=False).loss + 10 * gates()

    Args:
        model: a transformers model; attends to everything inside.
        selector: whose gates learn.
        detach_inputs: the gates' loss does not reach the model.

    Yields:
        A function: the sum of the layers' losses since the last call of it.
    """
    parts: list[Tensor] = []

    def hear(ctx: AttentionContext) -> None:
        if detach_inputs and ctx.q_pre is not None and ctx.k_pre is not None:
            ctx.q_pre, ctx.k_pre = ctx.q_pre.detach(), ctx.k_pre.detach()
        loss = selector.loss(ctx)
        if loss is not None:
            parts.append(loss)

    def total() -> Tensor:
        if not parts:
            raise ValueError("gate_loss: expected a call of the model before")
        found = torch.stack(parts).sum()
        parts.clear()
        return found

    with _taught(model, hear):
        yield total


@add_calibration("seerattention", make_gates, SeerGate, SeerDecodeGate, SeerAttentionSelector)
def calibrate_gates(
    model: nn.Module,
    windows: Tensor,
    *,
    on_progress: OnProgress | None = None,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 1,
    **options: Any,
) -> SeerAttentionSelector:
    """Makes gates and trains them.

    Args:
        model: a transformers model.
        windows: (windows, length) token ids.
        on_progress: called after every step.
        steps: of training.
        lr: largest learning rate.
        batch_size: windows a step.
        options: of `make_gates`.
    """
    selector = make_gates(model, **options)

    def report(done: int, total: int, loss: float) -> None:
        if on_progress is not None:
            on_progress(done, total)

    distill_gates(
        model, selector, windows, steps=steps, lr=lr, batch_size=batch_size, on_step=report
    )
    return selector


def save_gates(selector: SeerAttentionSelector, model: nn.Module, path: str | Path) -> None:
    """Writes the gates alone, some MB, with the model that they are for."""
    save_selector(selector, model, path)


def load_gates(path: str | Path, model: nn.Module) -> SeerAttentionSelector:
    """Reads gates for a model.

    Raises:
        ValueError: no such file, or it is of another model or another selector.
    """
    selector = load_selector(path, model)
    if not isinstance(selector, SeerAttentionSelector):
        raise ValueError(f"{path}: a file of {selector.slug!r}, expected 'seerattention'")
    return selector
