"""Packed 2:4 weights: exact, in the bytes the pattern promises, and refused where damaged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel import runtime
from aerogel.kernels import BlockRowWeight, NM24Weight, largest_level, quantize_rows
from aerogel.sparsity import NM, NMPairs

FORMS = {"2:4": NM(2, 4), "pairs": NMPairs(2, 4)}


def masked(form: str, rows: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = groups * (4 if form == "2:4" else 8)
    weight = torch.randn(rows, columns, generator=generator)
    mask = FORMS[form].select(weight.abs())
    return weight * mask, mask


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(FORMS)),
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from([None, 8, 4]),
    st.integers(0, 99),
)
def test_packing_and_unpacking_is_exact(form, rows, groups, bits, seed):
    weight, mask = masked(form, rows, groups, seed)
    if bits is None:
        packed = NM24Weight.pack(weight, mask, form)
        assert torch.equal(packed.unpack(), weight)
    else:
        levels, scales = quantize_rows(weight, bits)
        packed = NM24Weight.pack(levels, mask, form, bits=bits, scales=scales)
        assert torch.equal(packed.levels(), levels)
        assert torch.equal(packed.unpack(), levels * scales[:, None])
    assert torch.equal(packed.mask(), mask)
    again = NM24Weight.from_tensors(packed.to_tensors())
    assert torch.equal(again.unpack(), packed.unpack())
    assert (again.form, again.bits, again.shape) == (form, bits, packed.shape)


@pytest.mark.parametrize(
    ("form", "bits", "dtype", "group_bits"),
    [
        ("2:4", None, torch.float16, 2 * 16 + 4),
        ("2:4", 8, None, 2 * 8 + 4),
        ("pairs", 4, None, 4 * 4 + 4),
    ],
)
def test_bytes_are_those_of_the_pattern(form, bits, dtype, group_bits):
    weight, mask = masked(form, 6, 10)
    levels, scales = (weight.to(dtype), None) if bits is None else quantize_rows(weight, bits)
    packed = NM24Weight.pack(levels, mask, form, bits=bits, scales=scales)
    scale_bytes = 0 if scales is None else 4 * 6
    assert packed.nbytes == 6 * 10 * group_bits // 8 + scale_bytes


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_product_is_that_of_the_masked_weight(form, tokens):
    weight, mask = masked(form, 24, 8)
    x, bias = torch.randn(tokens, weight.shape[1]), torch.randn(24)
    packed = NM24Weight.pack(weight, mask, form)
    torch.testing.assert_close(packed.matmul(x, bias), x @ weight.t() + bias, rtol=0, atol=1e-5)
    for bits in (8, 4):
        levels, scales = quantize_rows(weight, bits)
        packed = NM24Weight.pack(levels, mask, form, bits=bits, scales=scales)
        dense = levels * scales[:, None]
        torch.testing.assert_close(packed.matmul(x), x @ dense.t(), rtol=0, atol=1e-5)


def test_integers_are_multiplied_exactly():
    weight, mask = masked("2:4", 16, 512)
    levels, scales = quantize_rows(weight)
    packed = NM24Weight.pack(levels, mask, bits=8, scales=scales)
    x = torch.randint(-127, 128, (5, weight.shape[1]), dtype=torch.int8)
    expected = (x.long()[:, None, :] * levels.long()).sum(-1)
    assert torch.equal(packed.matmul(x).long(), expected)
    with pytest.raises(ValueError, match="weight of levels"):
        NM24Weight.pack(weight, mask).matmul(x)


def test_files_hold_it_and_give_it_back(tmp_path):
    weight, mask = masked("2:4", 12, 16)
    weight[0, mask[0].nonzero()[0]] = 0.0  # a kept zero
    levels, scales = quantize_rows(weight)
    packed = NM24Weight.pack(levels, mask, bits=8, scales=scales)
    runtime.save({"fc.weight": packed.block_rows()}, tmp_path / "packed.safetensors")
    loaded = runtime.load_packed(tmp_path / "packed.safetensors")["fc.weight"]
    assert isinstance(loaded, BlockRowWeight)
    values, stored = loaded.stored()
    assert torch.equal(values, levels)
    assert torch.equal(stored, mask)
    assert torch.equal(loaded.scales, scales)
    entry = runtime.inspect(tmp_path / "packed.safetensors").tensors[0]
    assert entry.pattern == "2:4"


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_rows_are_rounded_to_so_many_bits(bits, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    levels, scales = quantize_rows(weight, bits)
    assert int(levels.abs().max()) == largest_level(bits) == 2 ** (bits - 1) - 1
    assert ((levels * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()


def _damaged(packed: NM24Weight, **changes: Tensor) -> dict[str, Tensor]:
    return {**packed.to_tensors(), **changes}


def test_what_is_not_such_a_weight_is_refused():
    weight, mask = masked("2:4", 4, 4)
    levels, scales = quantize_rows(weight)
    wrong = mask.clone()
    wrong[0, :4] = True
    for bad, match in (
        (lambda: NM24Weight.pack(weight, wrong), "exactly 2 of 4"),
        (lambda: NM24Weight.pack(weight, mask, "pairs"), "exactly 2 of 4"),
        (lambda: NM24Weight.pack(weight[:, :6], mask[:, :6]), "multiple of 4"),
        (lambda: NM24Weight.pack(weight[:, :12], mask[:, :12], "pairs"), "multiple of 8"),
        (lambda: NM24Weight.pack(weight, mask, "1:4"), "form='1:4'"),
        (lambda: NM24Weight.pack(weight, mask.float()), "bool of the same shape"),
        (lambda: NM24Weight.pack(levels, mask), "or bits"),
        (lambda: NM24Weight.pack(levels, mask, bits=4, scales=scales), "from -7 to 7"),
        (lambda: NM24Weight.pack(levels, mask, bits=3, scales=scales), "bits=3"),
        (lambda: NM24Weight.pack(levels, mask, bits=8), "scales"),
        (lambda: NM24Weight.pack(weight, mask).to_torch_semi_structured(), "on cuda"),
        (lambda: quantize_rows(weight, 9), "bits=9"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()


def test_damaged_parts_are_named():
    weight, mask = masked("2:4", 4, 4)
    packed = NM24Weight.pack(weight, mask)
    for changes, match in (
        ({"values": packed.values[:, :3]}, "values"),
        ({"index": packed.index[:3]}, "index: expected uint8"),
        ({"index": torch.zeros_like(packed.index)}, "ascending"),
        ({"shape": torch.tensor([4, 15])}, "groups of 4"),
        ({"group": torch.tensor(5)}, "groups of 5"),
        ({"bits": torch.tensor(8)}, "bits=8"),
    ):
        with pytest.raises(ValueError, match=match):
            NM24Weight.from_tensors(_damaged(packed, **changes))
    parts = packed.to_tensors()
    del parts["index"]
    with pytest.raises(ValueError, match="missing index"):
        NM24Weight.from_tensors(parts)
