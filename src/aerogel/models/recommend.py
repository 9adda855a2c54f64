"""Recommenders: matrix factorisation, LightGCN, NeuMF and Mult-VAE, and a sparse table to serve.

Users and items are whole numbers from 0. Every model gives `scores(...)`, one row of scores over
all items per user, so that ranking is always over the whole catalogue.

References: Koren, Bell, Volinsky, 2009 (matrix factorisation); Rendle et al., BPR, arXiv 1205.2618;
He et al., LightGCN, arXiv 2002.02126; He et al., NeuMF, arXiv 1708.05031; Liang et al., Mult-VAE,
arXiv 1802.05814.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.kernels.gather_rows import check_ids

L2 = 1e-4  # of the ego embeddings in BPR (LightGCN, section 4.1)
# Mult-VAE's annealing: its KL weight climbs to the cap over so many steps.
KL_CAP = 0.2
KL_STEPS = 200_000


class Factorization(nn.Module):
    """What models that score by inner products have in common.

    Args:
        n_users: users, at least 1.
        n_items: items, at least 1.
        dim: length of an embedding, at least 1.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, n_users: int, n_items: int, dim: int) -> None:
        super().__init__()
        check_sizes(n_users=n_users, n_items=n_items, dim=dim)
        self.n_users, self.n_items, self.dim = n_users, n_items, dim

    def ego(self) -> tuple[Tensor, Tensor]:
        """The trained embeddings themselves: (n_users, dim), (n_items, dim)."""
        raise NotImplementedError

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """What is multiplied: (n_users, dim), (n_items, dim)."""
        return self.ego()

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of pairs: two (batch,) integer tensors -> (batch,)."""
        check_ids("users", users, self.n_users)
        check_ids("items", items, self.n_items)
        of_users, of_items = self.embeddings()
        return (of_users[users] * of_items[items]).sum(-1)

    def scores(self, users: Tensor) -> Tensor:
        """Scores over all items: (batch,) integers -> (batch, n_items)."""
        check_ids("users", users, self.n_users)
        of_users, of_items = self.embeddings()
        return of_users[users] @ of_items.T


class MatrixFactorization(Factorization):
    """Users and items as vectors, the score their inner product; Xavier uniform start.

    Args:
        n_users: users.
        n_items: items.
        dim: length of an embedding.
    """

    def __init__(self, n_users: int, n_items: int, dim: int = 64) -> None:
        super().__init__(n_users, n_items, dim)
        self.users = nn.Embedding(n_users, dim)
        self.items = nn.Embedding(n_items, dim)
        for table in (self.users, self.items):
            nn.init.xavier_uniform_(table.weight)

    def ego(self) -> tuple[Tensor, Tensor]:
        return self.users.weight, self.items.weight


class LightGCN(Factorization):
    """Embeddings averaged over `layers` steps on the graph of users and items, without weights.

    E_k = A E_(k-1) with A = D^-1/2 (user-item adjacency) D^-1/2 and no self loops; the result is
    the mean of E_0 .. E_layers.

    Args:
        n_users: users.
        n_items: items.
        edge_index: (2, edges) integers: user, item of every training interaction.
        dim: length of an embedding.
        layers: propagation steps, at least 0.

    Raises:
        ValueError: sizes below 1, edges of another shape or out of range.
    """

    adjacency: Tensor

    def __init__(
        self, n_users: int, n_items: int, edge_index: Tensor, dim: int = 64, layers: int = 3
    ) -> None:
        super().__init__(n_users, n_items, dim)
        if layers < 0:
            raise ValueError(f"layers must be at least 0, got {layers}")
        self.layers = layers
        # One table, so that a budget can flow between users and items.
        self.table = nn.Embedding(n_users + n_items, dim)
        nn.init.xavier_uniform_(self.table.weight)
        self.register_buffer(
            "adjacency", _normalised_adjacency(n_users, n_items, edge_index), persistent=False
        )

    def ego(self) -> tuple[Tensor, Tensor]:
        weight = self.table.weight
        return weight[: self.n_users], weight[self.n_users :]

    def embeddings(self) -> tuple[Tensor, Tensor]:
        layer = total = self.table.weight
        for _ in range(self.layers):
            layer = _Propagate.apply(self.adjacency, layer)
            total = total + layer
        mean = total / (self.layers + 1)
        return mean[: self.n_users], mean[self.n_users :]


class _Propagate(torch.autograd.Function):
    """A @ x for a symmetric CSR matrix A, whose gradient is A @ g: no transpose is built."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, adjacency: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(adjacency)
        return adjacency @ x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[None, Tensor]:
        (adjacency,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, adjacency @ gradient.contiguous()


class NeuMF(nn.Module):
    """A generalised inner product beside an MLP on the pair of embeddings; one logit a pair.

    Args:
        n_users: users.
        n_items: items.
        dim: length of each of the four tables' embeddings.
        hidden: widths of the MLP, the first of which reads 2 * dim inputs.
        dropout: after every layer of the MLP, in [0, 1); 0.2 in the code released with DSL.

    Raises:
        ValueError: a size below 1, dropout out of range.
    """

    def __init__(
        self,
        n_users: int,
        n_items: int,
        dim: int = 16,
        hidden: Sequence[int] = (32, 16, 8),
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_sizes(n_users=n_users, n_items=n_items, dim=dim)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.n_users, self.n_items = n_users, n_items
        self.product_users = nn.Embedding(n_users, dim)
        self.product_items = nn.Embedding(n_items, dim)
        self.mlp_users = nn.Embedding(n_users, dim)
        self.mlp_items = nn.Embedding(n_items, dim)
        widths = (2 * dim, *hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers)
        self.head = nn.Linear(dim + widths[-1], 1)
        for table in (self.product_users, self.product_items, self.mlp_users, self.mlp_items):
            nn.init.normal_(table.weight, std=0.01)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Logits of pairs: two integer tensors of one shape -> that shape."""
        check_ids("users", users, self.n_users)
        check_ids("items", items, self.n_items)
        product = self.product_users(users) * self.product_items(items)
        pair = torch.cat((self.mlp_users(users), self.mlp_items(items)), dim=-1)
        logits: Tensor = self.head(torch.cat((product, self.mlp(pair)), dim=-1))
        return logits.squeeze(-1)

    def scores(self, users: Tensor) -> Tensor:
        """Logits over all items: (batch,) integers -> (batch, n_items)."""
        items = torch.arange(self.n_items, device=users.device)
        return torch.stack([self(user.expand(self.n_items), items) for user in users])


class MultVAE(nn.Module):
    """A variational autoencoder of a user's items with a multinomial likelihood.

    n_items - hidden - 2 x latent, latent - hidden - n_items, tanh between; the input is normalised
    to length 1, then dropped out.

    Args:
        n_items: items.
        hidden: width of the hidden layers.
        latent: length of a user's code.
        dropout: of the input, in [0, 1).

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, n_items: int, hidden: int = 600, latent: int = 200, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_sizes(n_items=n_items, hidden=hidden, latent=latent)
        self.n_items = n_items
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Sequential(
            nn.Linear(n_items, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, n_items)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # as in the code of Mult-VAE's authors
                nn.init.xavier_normal_(layer.weight)
                nn.init.normal_(layer.bias, std=0.001)

    def forward(self, interactions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, n_items) of 0 and 1 -> logits of that shape, mean and log-variance of codes.

        Raises:
            ValueError: another number of items.
        """
        if interactions.shape[-1] != self.n_items:
            raise ValueError(
                f"interactions must have {self.n_items} columns, got {interactions.shape[-1]}"
            )
        mean, log_variance = self.encoder(self.dropout(F.normalize(interactions))).chunk(2, dim=-1)
        code = mean
        if self.training:
            code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(code), mean, log_variance

    def loss(self, interactions: Tensor, beta: float) -> Tensor:
        """Negative multinomial log-likelihood + beta * KL divergence, mean over users."""
        logits, mean, log_variance = self(interactions)
        likelihood = (F.log_softmax(logits, dim=-1) * interactions).sum(-1).mean()
        divergence = 0.5 * (log_variance.exp() + mean.square() - 1.0 - log_variance).sum(-1).mean()
        return beta * divergence - likelihood

    def scores(self, interactions: Tensor) -> Tensor:
        """Logits over all items: (batch, n_items) -> (batch, n_items)."""
        logits: Tensor = self(interactions)[0]
        return logits


def annealed_beta(step: int, cap: float = KL_CAP, steps: int = KL_STEPS) -> float:
    """Mult-VAE's weight of the KL divergence: a line from 0 to `cap` over `steps`."""
    return cap * min(1.0, step / steps)


def bpr_loss(
    model: Factorization, users: Tensor, positives: Tensor, negatives: Tensor, l2: float = L2
) -> Tensor:
    """Bayesian personalised ranking: mean softplus(negative - positive score) + l2 / 2 |e|^2 / B.

    Args:
        model: of embeddings.
        users: (batch,) integers.
        positives: (batch,) items the users chose.
        negatives: (batch,) items they did not.
        l2: weight of the squares of the batch's ego embeddings.

    Raises:
        ValueError: ids out of range.

    Reference:
        Rendle et al., arXiv 1205.2618.
    """
    check_ids("users", users, model.n_users)
    check_ids("positives", positives, model.n_items)
    check_ids("negatives", negatives, model.n_items)
    of_users, of_items = model.embeddings()
    user = of_users[users]
    margin = (user * (of_items[negatives] - of_items[positives])).sum(-1)
    users_ego, items_ego = model.ego()
    touched = (users_ego[users], items_ego[positives], items_ego[negatives])
    squares = torch.stack([rows.square().sum() for rows in touched]).sum()
    return F.softplus(margin).mean() + l2 * 0.5 * squares / len(users)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless all sizes are at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _normalised_adjacency(n_users: int, n_items: int, edge_index: Tensor) -> Tensor:
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must be (2, edges), got {tuple(edge_index.shape)}")
    users, items = edge_index.long().unique(dim=1)  # an edge given twice counts once
    check_ids("edge_index[0]", users, n_users)
    check_ids("edge_index[1]", items, n_items)
    rows = torch.cat((users, items + n_users))
    columns = torch.cat((items + n_users, users))
    size = n_users + n_items
    degree = torch.bincount(rows, minlength=size).float()
    values = (degree[rows] * degree[columns]).rsqrt()
    edges = torch.stack((rows, columns))
    matrix = torch.sparse_coo_tensor(edges, values, (size, size), check_invariants=True)
    with warnings.catch_warnings():  # torch calls its CSR matrices a beta on first use
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return matrix.to_sparse_csr()
