"""What every selector promises. `test_contract.py` runs it over all selectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import plans as make
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    BankPlan,
    DensePlan,
    GroupPlan,
    KeyListPlan,
    Plan,
    Selector,
    TokenPlan,
    attend,
    merge,
    select,
)
from aerogel.attention.engine import Backend, attend_lse
from aerogel.kernels import native_available


@dataclass(frozen=True)
class Case:
    """A selector under test.

    Attributes:
        make: the selector, with sizes fit for some hundred tokens.
        full: the same with a budget for all keys, or None if the method has none.
        looks_ahead: the SELECTION of earlier rows depends on later tokens (stated by the method).
        chunk_invariant: a prompt in chunks selects what a prompt at once selects.
        right_padding: prompts may be padded at their end.
        whole: a call holds the whole sequence.
        one_softmax: the output is one softmax over the pairs of the plan's mask; not so where
            summaries stand for keys, or outputs of several groups are averaged.
        longest: rows of the longest call; for plans that the reference takes long for.
    """

    make: Callable[[], Selector]
    full: Callable[[], Selector] | None = None
    looks_ahead: bool = False
    chunk_invariant: bool = True
    right_padding: bool = True
    whole: bool = False
    one_softmax: bool = True
    longest: int = 1000

    def takes(self, shape: AttentionShape) -> bool:
        """Whether the selector plans calls of this shape."""
        return shape.q_len <= self.longest and (not self.whole or shape.q_len == shape.k_len)


def paddings(case: Case, shape: AttentionShape) -> dict[str, Tensor | None]:
    """No padding, left padding and right padding that differ by batch element."""
    j = torch.arange(shape.k_len)
    much = torch.arange(shape.batch)[:, None] * (shape.k_len // 5)
    found = {"none": None, "left": j >= much}
    return {**found, "right": j < shape.k_len - much} if case.right_padding else found


def choose(
    selector: Selector, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None
) -> Plan:
    """The selector's validated plan for a causal call."""
    shape = AttentionShape.of(q, k, causal=True)
    ctx = AttentionContext(q, k, v, shape, q.shape[-1] ** -0.5, key_padding=padding)
    plan = select(selector, ctx)
    plan.validate(shape)
    return plan


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check_native_is_the_reference(case: Case, shape: AttentionShape, dim: int) -> None:
    """Forward, log-sum-exp and gradients; every padding; float32 and bfloat16."""
    for name, padding in paddings(case, shape).items():
        q, k, v = make.tensors(shape, dim)
        plan = choose(case.make(), q, k, v, padding)
        tiled = native_available() and not isinstance(plan, (TokenPlan, GroupPlan, BankPlan))
        backend: Backend = "native" if tiled else "auto"
        results = []
        for which in (backend, "reference"):
            inputs = [t.clone().requires_grad_() for t in (q, k, v)]
            o, lse = attend_lse(*inputs, plan=plan, causal=True, key_padding=padding, backend=which)
            draw = torch.Generator().manual_seed(1)
            do = torch.randn(o.shape, generator=draw)
            dlse = torch.randn(lse.shape, generator=draw) * torch.isfinite(lse)
            outs, douts = [o, lse], [do, dlse]
            if isinstance(plan, GroupPlan) and plan.reduce == "mean":  # no one softmax, no lse
                outs, douts = [o], [do]
            grads = torch.autograd.grad(outs, inputs, douts)
            results.append((o, lse.nan_to_num(neginf=-1e4), *grads))
        for got, want in zip(*results, strict=True):
            scale = float(want.detach().abs().max().clamp(min=1))
            assert torch.isfinite(got).all(), name
            assert float((got - want).detach().abs().max()) <= 2e-5 * scale, name
        half = [t.bfloat16() for t in (q, k, v)]
        if isinstance(plan, BankPlan):
            plan = choose(case.make(), *half, padding)
        got = attend(*half, plan=plan, causal=True, key_padding=padding, backend=backend)
        wide = [t.float() for t in half]
        if isinstance(plan, BankPlan):
            plan = choose(case.make(), *wide, padding)
        want = attend(*wide, plan=plan, causal=True, key_padding=padding, backend="reference")
        close(got.float(), want, 2e-2)


def check_full_budget_is_dense(case: Case, shape: AttentionShape) -> None:
    """With a budget for everything, the result is torch's own."""
    if case.full is None:
        return
    for padding in paddings(case, shape).values():
        q, k, v = make.tensors(shape)
        plan = choose(case.full(), q, k, v, padding)
        got = attend(q, k, v, plan=plan, causal=True, key_padding=padding)
        mask = shape.causal_mask() & (True if padding is None else padding[:, None, None])
        want = scaled_dot_product_attention(
            q, k, v, attn_mask=mask.expand(shape.batch, 1, -1, -1), enable_gqa=True
        )
        filled = mask.any(-1).expand(shape.batch, shape.q_heads, shape.q_len)
        close(got[filled], want[filled])
        assert (got[~filled] == 0).all()


def check_no_row_sees_later_keys(case: Case, shape: AttentionShape) -> None:
    """Other keys and values after a position change nothing before it."""
    cut = shape.k_len - max(1, shape.q_len // 3)
    rows = max(0, cut - shape.q_offset)
    q, k, v = make.tensors(shape)
    plan = choose(case.make(), q, k, v)
    before = attend(q, k, v, plan=plan, causal=True)[:, :, :rows]
    k2, v2 = k.clone(), v.clone()
    k2[:, :, cut:], v2[:, :, cut:] = torch.randn(2, *k[:, :, cut:].shape) * 9
    assert torch.equal(attend(q, k2, v2, plan=plan, causal=True)[:, :, :rows], before)
    if not case.looks_ahead:
        q2 = q.clone()
        q2[:, :, rows:] = 9
        plan = choose(case.make(), q2, k2, v2)
        close(attend(q2, k2, v2, plan=plan, causal=True)[:, :, :rows], before)


def check_decode_is_the_last_row(case: Case, shape: AttentionShape) -> None:
    """A step with the keys that the prompt's last row had gives that row."""
    q, k, v = make.tensors(shape)
    plan = choose(case.make(), q, k, v)
    whole = attend(q, k, v, plan=plan, causal=True)
    last = KeyListPlan.from_bitmask(plan.to_dense_mask(shape)[:, :, -1:].contiguous())
    close(attend(q[:, :, -1:], k, v, plan=last, causal=True), whole[:, :, -1:])


def check_chunks_are_one_prompt(case: Case, shape: AttentionShape) -> None:
    """Prefill in two chunks selects and computes what one prefill does."""
    if not case.chunk_invariant:
        return
    q, k, v = make.tensors(shape)
    whole = attend(q, k, v, plan=choose(case.make(), q, k, v), causal=True)
    cut = shape.q_len // 2 // 16 * 16
    parts = []
    for rows in (slice(0, cut), slice(cut, shape.q_len)):
        keys = slice(0, shape.q_offset + rows.stop)
        chunk = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
        parts.append(attend(*chunk, plan=choose(case.make(), *chunk), causal=True))
    close(torch.cat(parts, 2), whole)


def check_counts_batches_and_threads(case: Case, shape: AttentionShape) -> None:
    """density() counts the pairs; the batch's order and the threads change nothing."""
    q, k, v = make.tensors(shape)
    plan = choose(case.make(), q, k, v)
    if case.one_softmax:
        assert torch.equal(plan.row_counts(shape), plan.to_dense_mask(shape).sum(-1))
    out = attend(q, k, v, plan=plan, causal=True)
    order = torch.arange(shape.batch).flip(0)
    turned = (q[order], k[order], v[order])
    assert torch.equal(attend(*turned, plan=choose(case.make(), *turned), causal=True), out[order])
    torch.set_num_threads(2)
    again = attend(q, k, v, plan=plan, causal=True)
    if isinstance(plan, DensePlan):  # torch's kernel, which splits by threads
        close(again, out)
    else:
        assert torch.equal(again, out)


def check_splits_merge(case: Case, shape: AttentionShape) -> None:
    """Any split of the plan's pairs, merged, is the whole."""
    q, k, v = make.tensors(shape)
    plan = choose(case.make(), q, k, v)
    mask = plan.to_dense_mask(shape)
    first = make.coin(torch.Generator().manual_seed(0), 0.5, *mask.shape)
    parts = [KeyListPlan.from_bitmask(mask & first), KeyListPlan.from_bitmask(mask & ~first)]
    merged, _ = merge([attend_lse(q, k, v, plan=part, causal=True) for part in parts])
    close(merged, attend(q, k, v, plan=plan, causal=True))
