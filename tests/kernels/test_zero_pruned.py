"""Zeroing by a mask, and the k largest: the native passes against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import needs_native

from aerogel.kernels import (
    largest_mask,
    largest_mask_reference,
    pack_mask,
    zero_pruned_,
    zero_pruned_reference_,
)

QUICK = settings(max_examples=60, deadline=None)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8)
SIZES = (0, 1, 31, 32, 33, 255, 256, 257, 1000)


def drawn(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with NaN, infinities and both zeros among them, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0])
    chosen = torch.rand(count, generator=generator) < 0.3
    values[chosen] = special[torch.arange(int(chosen.sum())) % 5]
    return values, torch.rand(count, generator=generator) < 0.5


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", SIZES)
def test_pruned_entries_are_zero_and_kept_ones_untouched(instruction_set, dtype, count):
    values, mask = drawn(count)
    values = values.nan_to_num(7.0).clamp(0, 9).to(dtype) if dtype is torch.uint8 else values
    ours, theirs = values.to(dtype), values.to(dtype)
    zero_pruned_(ours, mask)
    zero_pruned_reference_(theirs, mask)
    assert same_bits(ours, theirs)
    assert not bool((ours[~mask] != 0).any() or ours[~mask].to(torch.float64).signbit().any())
    again = values.to(dtype)
    zero_pruned_(again, mask, pack_mask(mask))
    assert same_bits(again, ours)


@needs_native
def test_any_number_of_threads_leaves_the_same():
    values, mask = drawn(200_001)
    results = []
    for threads in (1, 2, 3):
        results.append(values.clone())
        zero_pruned_(results[-1], mask, threads=threads)
    assert all(same_bits(results[0], other) for other in results)


@needs_native
def test_one_wrong_entry_anywhere_is_found():
    mask = torch.rand(700, generator=torch.Generator().manual_seed(0)) < 0.5
    for place in (~mask).nonzero().flatten()[::7].tolist():
        values = torch.zeros(700)
        values[place] = -0.0
        zero_pruned_(values, mask)
        assert not bool(values.signbit().any())


def test_other_layouts_and_wide_types_are_zeroed_too():
    values, mask = drawn(48)
    for tensor in (
        values.view(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 12, dtype=torch.complex128),
    ):
        kept = mask.view(tensor.shape)
        expected = torch.where(kept, tensor, torch.zeros_like(tensor))
        zero_pruned_(tensor, kept)
        assert torch.equal(tensor.nan_to_num(3.0), expected.nan_to_num(3.0))


@needs_native
def test_the_version_tells_of_a_change_and_only_of_one(monkeypatch):
    monkeypatch.delenv("AEROGEL_KERNELS", raising=False)
    values, mask = torch.ones(100), torch.arange(100) < 50
    zero_pruned_(values, mask)
    changed = values._version
    assert changed > 0
    zero_pruned_(values, mask)
    assert values._version == changed
    leaf = torch.ones(100, requires_grad=True)
    loss = (leaf**2).sum()
    zero_pruned_(leaf, mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_masks_that_do_not_fit_are_refused():
    values = torch.ones(4)
    for mask in (torch.ones(5, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(ValueError, match="mask must be bool"):
            zero_pruned_(values, mask)
    with pytest.raises(ValueError, match="mask must be bool"):
        zero_pruned_(values, torch.ones(4, dtype=torch.bool), torch.zeros(8, dtype=torch.uint8))


def few_levels(count: int, seed: int) -> torch.Tensor:
    levels = torch.tensor([-torch.inf, -2.5, -0.0, 0.0, 1e-38, 1.0, 1.0001, torch.inf])
    return levels[torch.randint(8, (count,), generator=torch.Generator().manual_seed(seed))]


def first_of_stable_sort(score: torch.Tensor, k: int, among: torch.Tensor | None) -> torch.Tensor:
    flat = score.flatten()
    places = torch.arange(len(flat)) if among is None else among.flatten().nonzero().flatten()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[places[flat[places].sort(descending=True, stable=True).indices[:k]]] = True
    return mask.view(score.shape)


@needs_native
@pytest.mark.parametrize("count", [1, 7, 64, 5001])
def test_every_isa_keeps_what_a_stable_sort_puts_first(instruction_set, count):
    generator = torch.Generator().manual_seed(count)
    among = torch.rand(count, generator=generator) < 0.4
    for score in (few_levels(count, 1), torch.randn(count, generator=generator)):
        for competing in (None, among):
            most = count if competing is None else int(competing.sum())
            for k in sorted({0, min(1, most), most // 3, most // 2, max(0, most - 1), most}):
                truth = first_of_stable_sort(score, k, competing)
                assert torch.equal(largest_mask(score, k, competing), truth), k
                assert torch.equal(largest_mask_reference(score, k, competing), truth), k


@QUICK
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.data(),
)
def test_any_shape_and_type_is_chosen_from_exactly(shape, dtype, data):
    score = few_levels(torch.Size(shape).numel(), data.draw(st.integers(0, 9))).to(dtype)
    score = score.view(shape).movedim(0, -1)
    k = data.draw(st.integers(0, score.numel()))
    mask = largest_mask(score, k)
    assert torch.equal(mask, first_of_stable_sort(score, k, None))
    assert torch.equal(mask, largest_mask_reference(score, k))


def test_more_than_competes_is_refused():
    score, among = torch.arange(4.0), torch.tensor([True, False, True, False])
    with pytest.raises(ValueError, match="only 2 entries compete"):
        largest_mask(score, 3, among)
    with pytest.raises(ValueError, match="keep"):
        largest_mask(score, -1)
    with pytest.raises(ValueError, match="only 2 entries compete"):
        largest_mask_reference(score, 3, among)
    with pytest.raises(ValueError, match="among must be bool"):
        largest_mask(score, 1, among[:3])
