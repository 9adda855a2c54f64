"""What every pruning method leaves behind compiles, and the runtime collects on its zeros."""

from __future__ import annotations

import warnings

import pytest
import torch
from fakes import build_with
from torch import nn

import aerogel
from aerogel.pruning import METHODS
from aerogel.runtime.strategies import PLANS
from every_method import pruned, samples

SPARSE_KERNELS = ("spmm", "sparse conv", "gemv")
# What a layer's zeros are called, by the pattern that a method pruned it with.
SEEN_AS = {"kernel-group:4": "4x1"}


# One-way filters have no zeros to collect on.
WITH_ZEROS = [slug for slug in METHODS if slug != "a-priori-compression"]


@pytest.fixture(scope="module", params=list(METHODS))
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # methods on layers as tiny as these
        model, pattern = pruned(request.param)
    return model.eval(), pattern


@pytest.mark.parametrize("network", WITH_ZEROS, indirect=True)
def test_its_layers_run_in_sparse_kernels(network: tuple[nn.Module, str]) -> None:
    model, pattern = network
    for batch in (1, 5):
        x = samples()[0][:batch]
        compiled = build_with(model, x, layer=SPARSE_KERNELS)
        explained = compiled.explain()
        assert explained.chosen == PLANS
        sparse = [row for row in explained.rows if row.sparsity > 0.5]
        assert sparse
        for row in sparse:
            assert row.pattern == SEEN_AS.get(pattern, pattern), row
            assert row.kernel.startswith(SPARSE_KERNELS), row
            assert row.seconds_sparse is not None
        with torch.no_grad():
            wanted = model(x)
        assert (compiled(x) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_it_compiles_with_measured_kernels_and_gives_the_same(
    network: tuple[nn.Module, str],
) -> None:
    x = samples()[0]
    compiled = aerogel.compile(network[0], (x,))
    with torch.no_grad():
        wanted = network[0](x)
    assert (compiled(x) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
