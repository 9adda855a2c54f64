"""Buffers in huge pages are tensors like any other, and are asked for where they pay only."""

from __future__ import annotations

import sys

import pytest
import torch

from aerogel.kernels import huge_pages


def test_buffers_have_the_shape_and_dtype_that_were_asked_for() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    for shape in ((2, 3, 4, 8), (1, 2, 16384, 64), (0, 3, 16384, 64)):
        buffer = huge_pages.empty_rows(like, *shape)
        assert buffer.shape == shape
        assert buffer.dtype == torch.bfloat16
        assert torch.equal(buffer.fill_(2), torch.full(shape, 2, dtype=torch.bfloat16))


def test_only_blocks_of_a_huge_page_or_more_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(huge_pages, "_ask", lambda address, size: asked.append((address, size)))
    like = torch.zeros(1)
    huge_pages.empty_rows(like, 1, 8, 8191, 64)
    huge_pages.empty_rows(like.to("meta"), 1, 8, 8192, 64)
    assert not asked
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *call: 0)
    buffer = huge_pages.empty_rows(like, 1, 8, 8192, 64)
    assert buffer.data_ptr() % huge_pages.HUGE_PAGE == 0
    assert buffer.is_contiguous()
    assert asked == [(buffer.data_ptr(), buffer.numel() * 4)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise(2) of Linux")
def test_whole_pages_inside_of_the_buffer_alone_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *call: named.append(call) or 0)
    page = huge_pages.mmap.PAGESIZE
    assert huge_pages._ask(10 * page + 1, 3 * page)
    assert named == [(11 * page, 2 * page, advice) for advice in (14, 25)]
    assert not huge_pages._ask(10 * page + 1, page // 2)
