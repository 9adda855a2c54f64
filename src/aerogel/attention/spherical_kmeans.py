"""Online spherical k-means: the centroids by which a Routing Transformer sorts queries and keys.

Reference: Roy et al., arXiv 2003.05997; moving averages of counts and sums as van den Oord et al.,
arXiv 1711.00937.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.arguments import check_choice, check_count, check_number

_LLOYD_STEPS = 10
_SMOOTHING = 1e-5  # added to every count, so that an empty cluster divides by no zero
_NORM_EPS = 1e-6


class SphericalKMeans(nn.Module):
    """Centroids of one layer: one set for each head.

    Args:
        num_heads: heads H.
        num_clusters: centroids c of a head.
        dim: width D of a vector.
        decay: share of the old average that an update keeps.
        commitment: factor of the loss that draws vectors to their centroid.
        norm: "layernorm" (vectors of length sqrt(D), centroids are their moving mean) or "l2"
            (vectors and centroids of length 1).
        init: "lloyd": ten steps of k-means on the first batch; "random": normalised noise.
        frozen: never update: random directions, for comparison.
        ema: centroids are moving means; else they are parameters, drawn to their vectors by a
            second term of the loss.

    Raises:
        ValueError: a size, factor or name is out of range.
    """

    mu: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    initialised: Tensor

    def __init__(
        self,
        num_heads: int,
        num_clusters: int,
        dim: int,
        decay: float = 0.999,
        commitment: float = 1e-4,
        norm: Literal["layernorm", "l2"] = "layernorm",
        init: Literal["lloyd", "random"] = "lloyd",
        frozen: bool = False,
        ema: bool = True,
    ) -> None:
        super().__init__()
        check_count("num_heads", num_heads)
        check_count("num_clusters", num_clusters)
        check_count("dim", dim)
        check_number("decay", decay, "[0, 1)")
        check_number("commitment", commitment, "[0, inf)")
        check_choice("norm", norm, ("layernorm", "l2"))
        check_choice("init", init, ("lloyd", "random"))
        self.decay, self.commitment, self.norm, self.frozen = decay, commitment, norm, frozen
        self.ema = ema
        mu = self.normalise(torch.randn(num_heads, num_clusters, dim))
        if ema or frozen:
            self.register_buffer("mu", mu)
        else:
            self.mu = nn.Parameter(mu)
        self.register_buffer("ema_count", torch.ones(num_heads, num_clusters))
        self.register_buffer("ema_sum", mu.clone())
        self.register_buffer("initialised", torch.tensor(init == "random" or frozen))

    def normalise(self, x: Tensor) -> Tensor:
        """Vectors (..., D) on the sphere on which they are compared."""
        if self.norm == "l2":
            return F.normalize(x, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=_NORM_EPS)

    def similarity(self, x: Tensor) -> Tensor:
        """Products of vectors (B, H, n, D) with the centroids: (B, H, n, c), float32."""
        return torch.einsum("bhnd,hcd->bhnc", x.float(), self.mu.float())

    def forward(
        self, x: Tensor, update: bool = False, key_padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare, assign, and learn if asked to.

        Args:
            x: (B, H, n, D), normalised.
            update: move the centroids; only while training.
            key_padding: (B, n) bool, True at real tokens; others teach nothing.

        Returns:
            similarity (B, H, n, c) before the update, nearest centroid (B, H, n) int64, and the
            commitment loss, a scalar with gradient to `x` only (without `ema` the centroids' loss
            is added, with gradient to them).

        Raises:
            ValueError: `update` in eval mode, or a centroid is not finite.
        """
        if update and not self.training:
            raise ValueError("update=True: expected a module in training mode, got eval mode")
        if not bool(torch.isfinite(self.mu).all()):
            raise ValueError("mu: expected finite centroids, got nan or inf")
        real = self._weights(x, key_padding)
        with torch.no_grad():
            if update and not bool(self.initialised):
                self._start(x, real)
            similarity = self.similarity(x.detach())
            nearest = similarity.argmax(-1)
        own = self._own(nearest).to(x.dtype)
        tokens = real.sum().clamp(min=1)
        spread = ((x - own.detach()) ** 2).mean(-1)
        loss = self.commitment * (spread * real).sum() / tokens
        if self.mu.requires_grad:
            loss = loss + (((x.detach() - own) ** 2).mean(-1) * real).sum() / tokens
        if update and self.ema and not self.frozen:
            with torch.no_grad():
                self._learn(x, nearest, real)
        return similarity, nearest, loss

    def _weights(self, x: Tensor, key_padding: Tensor | None) -> Tensor:
        """(B, H, n): 1 for tokens that count."""
        if key_padding is None:
            return x.new_ones(x.shape[:3])
        return key_padding[:, None].to(x.dtype).expand(x.shape[:3])

    def _own(self, nearest: Tensor) -> Tensor:
        """(B, H, n, D): each token's centroid."""
        heads = torch.arange(nearest.shape[1], device=nearest.device)[:, None]
        return self.mu[heads, nearest]

    def _sums(self, x: Tensor, nearest: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (H, c) and their sum (H, c, D) of every cluster, over all processes."""
        chosen = F.one_hot(nearest, self.mu.shape[1]).float() * real[..., None].float()
        count = chosen.sum((0, 2))
        total = torch.einsum("bhnc,bhnd->hcd", chosen, x.float())
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        return count, total

    def _learn(self, x: Tensor, nearest: Tensor, real: Tensor) -> None:
        count, total = self._sums(x, nearest, real)
        if self.norm == "l2":
            fresh = torch.where(count[..., None] > 0, F.normalize(total, dim=-1), self.mu)
            self.mu.mul_(self.decay).add_(fresh, alpha=1 - self.decay)
            return
        self.ema_count.mul_(self.decay).add_(count, alpha=1 - self.decay)
        self.ema_sum.mul_(self.decay).add_(total, alpha=1 - self.decay)
        whole = self.ema_count.sum(-1, keepdim=True)
        smooth = (self.ema_count + _SMOOTHING) / (whole + self.mu.shape[1] * _SMOOTHING) * whole
        self.mu.copy_(self.ema_sum / smooth[..., None])

    def _start(self, x: Tensor, real: Tensor) -> None:
        """Lloyd's algorithm from tokens of this batch; all processes take the first one's draw."""
        clusters = self.mu.shape[1]
        for head in range(x.shape[1]):
            tokens = x[:, head][real[:, head] > 0].float()
            if len(tokens):
                drawn = torch.randperm(len(tokens), device=x.device)[:clusters]
                self.mu[head, : len(drawn)] = tokens[drawn]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.mu, 0)
        for _ in range(_LLOYD_STEPS):
            nearest = self.similarity(x).argmax(-1)
            count, total = self._sums(x, nearest, real)
            middle = self.normalise(total / count.clamp(min=1)[..., None])
            self.mu.copy_(torch.where(count[..., None] > 0, middle, self.mu))
        self.ema_count.copy_(count.clamp(min=1))
        self.ema_sum.copy_(self.mu * self.ema_count[..., None])
        self.initialised.fill_(True)


def hash_centroids(num_heads: int, num_clusters: int, dim: int) -> Tensor:
    """Directions (H, c, D) whose nearest one is a vector's sign hash by log2(c) random planes.

    Raises:
        ValueError: the number of clusters is no power of two.
    """
    bits = num_clusters.bit_length() - 1
    if num_clusters != 1 << bits:
        raise ValueError(f"num_clusters={num_clusters}: expected a power of two for routing='hash'")
    planes = torch.randn(num_heads, bits, dim)
    codes = torch.arange(num_clusters)[:, None] >> torch.arange(bits) & 1
    return torch.einsum("cb,hbd->hcd", codes.float() * 2 - 1, planes)
