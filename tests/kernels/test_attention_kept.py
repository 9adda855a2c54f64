"""Calls of attention whose checks are kept: the same results and the same refusals as the first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import Case, random_case
from instruction_sets import needs_native

from aerogel.kernels import attention_kept
from aerogel.kernels.attention import attention_forward
from aerogel.kernels.attention_reference import attention_forward_reference

pytestmark = needs_native


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    attention_kept._kept.clear()


def forward(case: Case, **changed: object) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_forward(*case.arguments(), **{**case.options, **changed})


def assert_right(case: Case) -> None:
    o, lse = forward(case)
    expected, expected_lse = attention_forward_reference(*case.arguments(), **case.options)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["plain", "inside", "sliced"])
@pytest.mark.parametrize("window", ["none", "one"])
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_a_kept_call_reads_other_tensors_and_tiles(layout: str, window: str, q_len: int) -> None:
    strides = set()
    for seed in range(4):
        case = random_case(q_len=q_len, layout=layout, window=window, seed=seed)
        assert_right(case)
        strides.add(forward(case)[0].stride())
    assert len(strides) == len(attention_kept._kept) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "columns"},
        {"window": "heads"},
        {"bias": True},
        {"padding": True},
        {"sink": True},
    ],
)
def test_what_is_copied_or_lies_in_tensors_is_checked_every_time(options: dict) -> None:
    for seed in range(2):
        assert_right(random_case(seed=seed, **options))
    assert not attention_kept._kept


def test_other_rules_are_other_calls() -> None:
    case = random_case(q_len=5)
    for causal in (True, False):
        for scale in (None, 0.5):
            for softcap in (None, 2.0):
                case.options |= {"causal": causal, "scale": scale, "softcap": softcap}
                assert_right(case)
                assert_right(case)
    assert len(attention_kept._kept) == 8


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[:-1], "tile_ptr"),
        (0, lambda x: x.int(), "tile_ptr"),
        (1, lambda x: x.int(), "kind"),
        (2, lambda x: x.long(), "start"),
        (2, lambda x: x[:-1], "start"),
        (2, lambda x: x - 1000, "tile"),
        (3, lambda x: x[None], "length"),
        (3, lambda x: x + 100, "tile"),
        (4, lambda x: x[:0], "tile"),
        (4, lambda x: x + 1000, "gather_idx"),
    ],
)
def test_a_kept_call_refuses_what_the_first_would(index: int, change, message: str) -> None:
    case = random_case(density=1.0)
    forward(case)
    assert attention_kept._kept
    case.stream[index] = change(case.stream[index])
    with pytest.raises(ValueError, match=message):
        forward(case)


def test_threads_and_strided_tiles_are_judged_in_full() -> None:
    case = random_case()
    expected = forward(case)
    with pytest.raises(ValueError, match="threads=0"):
        forward(case, threads=0)
    case.stream[2] = case.stream[2].repeat_interleave(2)[::2]
    assert all(map(torch.equal, forward(case), expected))


def test_the_reference_runs_even_where_a_call_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case()
    forward(case)
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    expected = attention_forward_reference(*case.arguments(), **case.options)
    assert all(map(torch.equal, forward(case), expected))


def test_no_more_calls_are_kept_than_there_is_room_for() -> None:
    for k_len in range(20, 20 + 2 * attention_kept._MOST_CALLS):
        assert_right(random_case(q_len=1, k_len=k_len))
        assert len(attention_kept._kept) <= attention_kept._MOST_CALLS


def test_one_kept_call_runs_on_many_threads_at_once() -> None:
    many = [random_case(q_len=2, k_len=100, seed=seed) for seed in range(16)]
    expected = [attention_forward_reference(*c.arguments(), **c.options) for c in many]
    forward(many[0])
    with ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            for (o, lse), (want, want_lse) in zip(pool.map(forward, many), expected, strict=True):
                torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
