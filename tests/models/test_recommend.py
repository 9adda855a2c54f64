"""Recommenders and the sparse table that serves them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel import kernels
from aerogel.kernels import entries_above, entries_above_reference
from aerogel.models import (
    LightGCN,
    MatrixFactorization,
    MultVAE,
    NeuMF,
    SparseEmbeddingTable,
    bpr_loss,
    sparse_table,
)
from aerogel.models.recommend import annealed_beta

EDGES = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 2, 3]])


def masked(rows, dim, density=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, dim, generator=generator)
    return weight * (torch.rand(rows, dim, generator=generator) < density)


def test_light_gcn_averages_the_normalised_propagations():
    torch.manual_seed(0)
    model = LightGCN(3, 5, EDGES, dim=4, layers=3)  # item 4 has no edge
    adjacency = torch.zeros(8, 8)
    adjacency[EDGES[0], EDGES[1] + 3] = 1.0
    adjacency = adjacency + adjacency.T
    scale = adjacency.sum(1).clamp(min=1.0).rsqrt()
    adjacency = scale[:, None] * adjacency * scale
    table = model.table.weight
    layers = [torch.linalg.matrix_power(adjacency, k) @ table for k in range(4)]
    users, items = model.embeddings()
    expected = torch.stack(layers).mean(0)
    torch.testing.assert_close(torch.cat((users, items)), expected)
    upstream = torch.randn(8, 4)
    (ours,) = torch.autograd.grad(torch.cat((users, items)), table, upstream, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, table, upstream)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["mf", "lightgcn", "neumf"])
def test_scores_over_all_items_are_those_of_the_pairs(kind):
    torch.manual_seed(0)
    models = {
        "mf": MatrixFactorization(3, 5, 4),
        "lightgcn": LightGCN(3, 5, EDGES, 4, 2),
        "neumf": NeuMF(3, 5),
    }
    model = models[kind].eval()
    users = torch.tensor([2, 0])
    pairs = torch.stack([model(u.expand(5), torch.arange(5)) for u in users])
    torch.testing.assert_close(model.scores(users), pairs)


def test_neumf_has_the_papers_layers():
    shapes = [tuple(p.shape) for n, p in NeuMF(3, 5).named_parameters() if n.endswith("weight")]
    assert shapes == [(3, 16), (5, 16), (3, 16), (5, 16), (32, 32), (16, 32), (8, 16), (1, 24)]

    assert NeuMF(3, 5).mlp[2].p == 0.2
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        NeuMF(3, 5, dropout=1.0)


def test_mult_vae_starts_as_its_authors_do():
    torch.manual_seed(0)
    model = MultVAE(300, hidden=200, latent=50)
    assert float(model.encoder[0].weight.detach().std()) == pytest.approx(
        (2 / 500) ** 0.5, rel=0.02
    )
    assert 0 < float(model.encoder[0].bias.detach().std()) < 0.0013


def test_mult_vae_codes_by_the_mean_when_it_does_not_train():
    torch.manual_seed(0)
    model = MultVAE(50, hidden=12, latent=4)
    seen = (torch.rand(6, 50) < 0.2).float()
    assert not torch.equal(model.scores(seen), model.scores(seen))
    model.eval()
    assert torch.equal(model.scores(seen), model.scores(seen))
    logits, mean, log_variance = model(seen)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(
        normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)
    ).sum(1)
    likelihood = (logits.softmax(1).log() * seen).sum(1)
    expected = (0.2 * divergence - likelihood).mean()
    torch.testing.assert_close(model.loss(seen, 0.2), expected)
    assert [annealed_beta(step) for step in (0, 100_000, 400_000)] == [0.0, 0.1, 0.2]


def test_mult_vae_learns_to_rank_what_users_chose():
    torch.manual_seed(0)
    model = MultVAE(40, hidden=32, latent=8)
    seen = torch.zeros(20, 40)
    seen[:10, :20] = (torch.rand(10, 20) < 0.5).float()
    seen[10:, 20:] = (torch.rand(10, 20) < 0.5).float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        optimizer.zero_grad()
        model.loss(seen, annealed_beta(step, steps=60)).backward()
        optimizer.step()
    model.eval()
    scores = model.scores(seen)
    assert (scores[:10, :20].mean(1) > scores[:10, 20:].mean(1)).all()
    assert (scores[10:, 20:].mean(1) > scores[10:, :20].mean(1)).all()


def test_bpr_is_the_formula():
    torch.manual_seed(0)
    model = MatrixFactorization(3, 5, 4)
    users, positives, negatives = torch.tensor([[0, 2], [1, 3], [4, 0]])
    margin = model(users, positives) - model(users, negatives)
    ego = [model.users(users), model.items(positives), model.items(negatives)]
    squares = sum(rows.detach().square().sum() for rows in ego)
    expected = -margin.sigmoid().log().mean() + 0.1 * 0.5 * squares / 2
    torch.testing.assert_close(bpr_loss(model, users, positives, negatives, l2=0.1), expected)


def test_ids_and_sizes_out_of_range_are_named():
    model = MatrixFactorization(3, 5, 4)
    zero = torch.tensor([0])
    with pytest.raises(ValueError, match=r"users must be in \[0, 3\), got 3 .. 3"):
        model(torch.tensor([3]), zero)
    with pytest.raises(ValueError, match=r"items must be in \[0, 5\), got -1 .. -1"):
        model(zero, torch.tensor([-1]))
    with pytest.raises(ValueError, match="users"):
        model.scores(torch.tensor([7]))
    with pytest.raises(ValueError, match="negatives must be"):
        bpr_loss(model, zero, zero, torch.tensor([5]))
    with pytest.raises(ValueError, match="users"):
        NeuMF(3, 5)(torch.tensor([3]), zero)
    with pytest.raises(ValueError, match=r"edge_index\[1\]"):
        LightGCN(3, 3, EDGES)
    with pytest.raises(ValueError, match=r"\(2, edges\)"):
        LightGCN(3, 5, EDGES.T)
    with pytest.raises(ValueError, match="layers must be at least 0"):
        LightGCN(3, 5, EDGES, layers=-1)
    with pytest.raises(ValueError, match="n_items must be at least 1, got 0"):
        MatrixFactorization(3, 0, 4)
    with pytest.raises(ValueError, match="5 columns, got 4"):
        MultVAE(5)(torch.zeros(1, 4))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 7, 64, 256, 300]), st.floats(0.0, 1.0))
def test_a_sparse_table_is_the_table(rows, dim, density):
    weight = masked(rows, dim, density)
    table = SparseEmbeddingTable.from_masked(weight)
    assert torch.equal(table.dense(), weight)
    assert table.columns.dtype == (torch.uint8 if dim <= 256 else torch.int32)
    ids = torch.randint(0, rows, (3, 4))
    assert torch.equal(table(ids), weight[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [64, 300])
def test_lookups_are_those_of_the_reference(monkeypatch, dtype, dim):
    weight = masked(700, dim)
    weight[3] = 0.0
    values = torch.tensor([6e-8, -6.1e-5, 65504.0, torch.inf, -torch.inf, torch.nan])
    weight[5, :6] = values  # the ends of half precision
    table = SparseEmbeddingTable.from_masked(weight, dtype)
    ids = torch.randint(0, 700, (600,), generator=torch.Generator().manual_seed(1))
    ids[:2] = torch.tensor([3, 5])
    ours = table(ids)
    torch.testing.assert_close(ours, weight[ids].to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    torch.testing.assert_close(ours, table(ids), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
@pytest.mark.parametrize("isa", kernels.available_isas() if kernels.native_available() else [])
@pytest.mark.parametrize("dim", [1, 15, 64, 300])
def test_every_isa_looks_up_the_same_rows(isa, dim):
    weight = masked(90, dim, 0.5)
    ids = torch.randint(0, 90, (7, 100), generator=torch.Generator().manual_seed(1))
    before = kernels.isa()
    kernels.set_isa(isa)
    try:
        for dtype in (torch.float32, torch.float16):
            table = SparseEmbeddingTable.from_masked(weight, dtype)
            expected = weight.to(dtype).float()[ids]
            for asked in (ids, ids.int(), ids.to(torch.uint8), ids.t().contiguous().t()):
                assert torch.equal(table(asked), expected)
            assert table(ids[:0]).shape == (0, 100, dim)
    finally:
        kernels.set_isa(before)


def test_every_number_of_threads_looks_up_the_same_rows():
    weight = masked(500, 64)
    table = SparseEmbeddingTable.from_masked(weight)
    ids = torch.randint(0, 500, (1500,), generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(table(ids), weight[ids])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.int16])
def test_ids_outside_the_table_are_refused_wherever_they_stand(kind):
    table = SparseEmbeddingTable.from_masked(masked(10, 8))
    for place in (0, 299, 599):
        for wrong in (-1, 10):
            ids = torch.zeros(600, dtype=kind)
            ids[place] = wrong
            with pytest.raises(ValueError, match=r"ids must be in \[0, 10\)"):
                table(ids)


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
def test_a_damaged_table_gives_wrong_rows_and_no_more(monkeypatch):
    monkeypatch.delenv("AEROGEL_KERNELS", raising=False)
    weight = masked(40, 20, 0.5)
    table = SparseEmbeddingTable.from_masked(weight)
    table.row_ptr[7], table.row_ptr[30] = -5, 10**9
    table.columns[::9] = 200
    before = kernels.isa()
    try:
        for isa in kernels.available_isas():
            kernels.set_isa(isa)
            assert table(torch.arange(40)).shape == (40, 20)
    finally:
        kernels.set_isa(before)


def test_entries_above_their_columns_limit_are_all_found():
    generator = torch.Generator().manual_seed(0)
    for rows, columns, at in ((1, 1, 0.0), (300, 7, 1.0), (700, 64, -1.0), (5, 3, 9.0)):
        matrix = torch.randn(rows, columns, generator=generator)
        limits = at + torch.rand(columns, generator=generator)
        ours, theirs = entries_above(matrix, limits), entries_above_reference(matrix, limits)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_best_rows_are_those_of_the_dense_product(monkeypatch):
    monkeypatch.setattr(sparse_table, "ITEMS_AT_ONCE", 30)  # blocks, the last of them short
    weight, queries = masked(100, 64), torch.randn(5, 64)
    table = SparseEmbeddingTable.from_masked(weight)
    dense = queries @ weight.T
    torch.testing.assert_close(table.scores(queries), dense)
    for k in (1, 20, 50, 100):
        scores, rows = table.topk(queries, k)
        torch.testing.assert_close(scores, dense.topk(k).values)
        torch.testing.assert_close(dense.gather(1, rows), scores)


def test_new_values_are_what_is_scored_next():
    table = SparseEmbeddingTable.from_masked(masked(10, 8))
    queries = torch.randn(2, 8)
    before = table.scores(queries)
    table.load_state_dict({**table.state_dict(), "values": 2 * table.values})
    torch.testing.assert_close(table.scores(queries), 2 * before)


def test_a_fifth_of_64_dimensions_takes_about_a_quarter_of_the_bytes():
    weight = masked(4000, 64)
    table = SparseEmbeddingTable.from_masked(weight)
    expected = int((weight != 0).sum()) * 5 + 8 * 4001
    assert table.nbytes == expected < 0.3 * weight.nbytes
    half = SparseEmbeddingTable.from_masked(weight, torch.float16)
    torch.testing.assert_close(half.dense(), weight, rtol=1e-3, atol=1e-4)
    assert half.nbytes < table.nbytes


def test_misuse_of_a_sparse_table_is_named():
    table = SparseEmbeddingTable.from_masked(masked(10, 8))
    with pytest.raises(ValueError, match=r"ids must be in \[0, 10\), got 10"):
        table(torch.tensor([10]))
    with pytest.raises(ValueError, match=r"k must be in \[1, 10\], got 11"):
        table.topk(torch.randn(1, 8), 11)
    with pytest.raises(ValueError, match=r"queries must be \(batch, 8\)"):
        table.scores(torch.randn(1, 7))
    with pytest.raises(ValueError, match=r"weight must be \(rows, dim\)"):
        SparseEmbeddingTable.from_masked(torch.randn(3))
    with pytest.raises(ValueError, match="dtype must be"):
        SparseEmbeddingTable.from_masked(masked(3, 3), torch.bfloat16)
    with pytest.raises(ValueError, match="row_ptr must end"):
        SparseEmbeddingTable(table.values, table.columns, table.row_ptr[:-1] * 2, 8)
