"""A step on rings writes where the reference writes, and reads every slot of its head."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import needs_native

from aerogel.kernels.ring_step import RingLayout, RingStep, write_rings_reference

pytestmark = needs_native


def layout_of(padded: list[int], strided: bool) -> RingLayout:
    sinks, windows = torch.tensor([0, 2, 5]), torch.tensor([3, 7, 0])
    strides = torch.tensor([2, 0, 3]) if strided else torch.zeros(3, dtype=torch.int64)
    firsts = torch.tensor([1, 0, 0])
    room = sinks + windows + (strides > 0) * 4 * 12
    offsets = torch.nn.functional.pad(room.cumsum(0), (1, 0))
    return RingLayout(offsets, sinks, windows, strides, firsts, 4, torch.tensor(padded).long())


def empty_rings(
    layout: RingLayout, dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (layout.padded.numel(), int(layout.offsets[-1]))
    return (
        torch.zeros(*shape, dim, dtype=dtype),
        torch.zeros(*shape, value_dim, dtype=dtype),
        torch.full(shape, -1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("padded", [[0], [0, 5], []])
def test_tokens_land_where_the_reference_puts_them(dtype, strided, padded):
    layout = layout_of(padded, strided)
    got, want = (empty_rings(layout, 8, 5, dtype) for _ in range(2))
    step = RingStep(*got, layout)
    batch = len(padded)
    for position in range(40):
        keys = torch.randn(batch, 1, 3, 8).to(dtype).transpose(1, 2)
        values = torch.randn(batch, 3, 1, 10).to(dtype)[..., ::2]  # no unit stride
        step.write(position, keys, values)
        write_rings_reference(want, layout, position, keys, values)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_other_sizes_than_the_rings_hold_are_refused():
    layout = layout_of([0], False)
    step = RingStep(*empty_rings(layout, 8, 5, torch.float32), layout)
    good = torch.zeros(1, 3, 1, 8), torch.zeros(1, 3, 1, 5)
    step.write(0, *good)
    with pytest.raises(ValueError, match=r"keys: .* expected torch.float32 \(1, 3, 1, 8\)"):
        step.write(0, torch.zeros(1, 2, 1, 8), good[1])
    with pytest.raises(ValueError, match=r"values: torch\.float16"):
        step.write(0, good[0], good[1].half())
    with pytest.raises(ValueError, match=r"k: torch\.float32"):
        step.attend(torch.zeros(1, 3, 1, 8).bfloat16(), 1.0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_step_reads_every_slot_of_its_key_head(instruction_set, dtype, group, softcap):
    layout = layout_of([0, 0], False)
    keys, values, positions = empty_rings(layout, 8, 5, dtype)
    keys.normal_()
    values.normal_()
    step = RingStep(keys, values, positions, layout)
    rows = [torch.randn(2, 3 * group, 1, 8), torch.randn(2, 1, 3 * group, 8).transpose(1, 2)]
    rows += [torch.randn(2, 3 * group, 1, 16)[..., ::2], rows[0] * 3]
    for q in (row.to(dtype) for row in rows):
        o, lse = step.attend(q, 0.5, softcap)
        for head in range(3 * group):
            slots = slice(*layout.offsets[head // group : head // group + 2])
            logits = q[:, head].float() @ keys[:, slots].float().transpose(1, 2) * 0.5
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            want = logits.softmax(-1) @ values[:, slots].float()
            rough = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(o[:, head].float(), want, rtol=rough, atol=rough)
            torch.testing.assert_close(lse[:, head], logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
