"""Every selector keeps the contract."""

from __future__ import annotations

import contract
import pytest
import small_selectors as small
from contract import Case

from aerogel.attention import AttentionShape

CASES = {
    "test-dense": Case(small.Dense, small.Dense),
    "test-blocks": Case(small.Blocks, lambda: small.Blocks(1000)),
    "test-lists": Case(small.Lists, lambda: small.Lists(1000)),
    "test-spans": Case(small.Spans, lambda: small.Spans(0, 1000)),
    "test-block-spans": Case(
        lambda: small.Spans(1, 2, "block"), lambda: small.Spans(0, 1000, "block")
    ),
}
SHAPES = {
    "one token": AttentionShape(3, 8, 2, 1, 65, causal=True),
    "few": AttentionShape(1, 4, 4, 7, 7, causal=True),
    "block": AttentionShape(3, 8, 2, 64, 64, causal=True),
    "chunk": AttentionShape(1, 4, 4, 64, 190, causal=True),
    "long": AttentionShape(1, 8, 2, 300, 300, causal=True),
}

each = pytest.mark.parametrize("slug", CASES)
every_shape = pytest.mark.parametrize("size", SHAPES)


@each
@every_shape
@pytest.mark.parametrize("dim", [16, 96])
def test_native_is_the_reference(slug, size, dim):
    contract.check_native_is_the_reference(CASES[slug], SHAPES[size], dim)


@each
@every_shape
def test_a_full_budget_is_dense_attention(slug, size):
    contract.check_full_budget_is_dense(CASES[slug], SHAPES[size])


@each
@every_shape
def test_no_row_sees_later_keys(slug, size):
    contract.check_no_row_sees_later_keys(CASES[slug], SHAPES[size])


@each
@every_shape
def test_a_step_is_the_last_row_of_the_prompt(slug, size):
    contract.check_decode_is_the_last_row(CASES[slug], SHAPES[size])


@each
@pytest.mark.parametrize("size", ["block", "chunk", "long"])
def test_chunks_are_one_prompt(slug, size):
    contract.check_chunks_are_one_prompt(CASES[slug], SHAPES[size])


@each
@every_shape
def test_counts_batches_and_threads(slug, size):
    contract.check_counts_batches_and_threads(CASES[slug], SHAPES[size])


@each
@every_shape
def test_splits_merge(slug, size):
    contract.check_splits_merge(CASES[slug], SHAPES[size])
