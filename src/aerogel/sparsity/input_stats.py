"""First and second moments of what a layer's weight is multiplied with (P12).

Reference: Frantar & Alistarh, SparseGPT, arXiv 2301.00774; Sun et al., Wanda, arXiv 2306.11695;
Zhang et al., DSnoT, arXiv 2310.08915.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

STATS = ("sum", "sumsq", "mean", "var", "hessian")
# Unfolded convolution inputs are processed in slices of at most this many elements (64 MB).
UNFOLD_ELEMENTS = 1 << 24


class InputStats:
    """Streaming first and second moments of the inputs of one linear or convolution layer.

    Features are the columns of the flattened weight `(out, F)`: F = in for linear layers and
    F = in/groups * prod(kernel), in PyTorch's (channel, *kernel) order, for convolutions, whose
    input is unfolded so that every output position counts as one token. A *sample* is one entry
    of the batch (a sequence, an image), a *token* one row the weight is multiplied with. Inputs
    that a model flattened to (batch * tokens, features) are split into samples again.

    With S samples, T tokens in all, and x a token:

    | name | formula | shape |
    | --- | --- | --- |
    | `sum` | sum over tokens x | (F,) |
    | `sumsq` | sum over tokens x^2 | (F,) |
    | `mean` | sum / T | (F,) |
    | `var` | variance inside a sample, token-weighted mean over samples (else pooled) | (F,) |
    | `hessian` | (2/S) * sum over tokens x x^T | (F, F) |
    | `signed_mean` | sum / S | (F,) |
    | `norm` | sqrt(sumsq / S), Wanda's feature norm | (F,) |

    Grouped convolutions with g > 1 have a leading dimension g everywhere. All results are float32.

    Args:
        module: the layer; `in_features`, convolution geometry and device are read from it.
        name: used in error messages.
        stats: which of `STATS` are wanted; the Hessian is only accumulated on demand.
    """

    def __init__(self, module: nn.Module, name: str, stats: Collection[str] = STATS) -> None:
        self.name = name
        self.wanted = _checked_stats(stats)
        self.conv = module if isinstance(module, _CONVS) else None
        self.groups = int(self.conv.groups) if self.conv is not None else 1
        self.samples = 0
        self.tokens = 0
        self._sum: Tensor | None = None
        self._sumsq: Tensor | None = None
        self._within: Tensor | None = None
        self._moment: Tensor | None = None  # (g, F, F), running mean over samples of x x^T
        if self.conv is not None and isinstance(self.conv, _TRANSPOSED):
            raise ValueError(f"{name}: statistics of transposed convolutions are not defined")

    def update(
        self, x: Tensor, *, batch_size: int | None = None, token_mask: Tensor | None = None
    ) -> None:
        """Add one batch of inputs.

        Args:
            x: layer input: (batch, tokens, in), (rows, in) or (in,) for linear layers, batched or
                unbatched NCHW-style input for convolutions.
            batch_size: number of samples in the model's batch, to tell samples in flattened input.
            token_mask: (batch, tokens) bool, True = count; ignored where it does not fit `x`.
        """
        for rows, lengths in self._tokens_of(x.detach(), batch_size, token_mask):
            self._accumulate(rows, lengths)

    def _tokens_of(
        self, x: Tensor, batch_size: int | None, token_mask: Tensor | None
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield (g, rows, F) slices together with the number of rows of each sample in them."""
        if self.conv is not None:
            batched = x if x.ndim == self.conv.weight.ndim else x[None]
            for slice_ in _sample_slices(batched, self.conv):
                cols = unfold_input(slice_, self.conv)  # [b, g, P, F]
                rows = cols.transpose(0, 1).flatten(1, 2)
                yield rows, [cols.shape[2]] * cols.shape[0]
            return
        if x.ndim == 1:
            x = x[None]
        rows_in_all = x.numel() // x.shape[-1]
        if x.ndim > 2:
            samples = x.shape[0]
        else:  # (rows, in): batch * tokens flattened, or one row per sample
            known = batch_size is not None and batch_size > 0 and rows_in_all % batch_size == 0
            samples = batch_size if known and batch_size is not None else rows_in_all
        flat = x.reshape(1, rows_in_all, x.shape[-1])
        per_sample = rows_in_all // max(samples, 1)
        lengths = [per_sample] * samples
        if token_mask is not None and token_mask.numel() == rows_in_all:
            keep = token_mask.reshape(samples, per_sample).to(x.device).bool()
            lengths = [int(n) for n in keep.sum(1).tolist()]
            flat = flat[:, keep.flatten()]
        yield flat, lengths

    def _accumulate(self, rows: Tensor, lengths: list[int]) -> None:
        lengths = [n for n in lengths if n > 0]
        if not lengths:
            return
        rows = rows.float()
        groups, count, features = rows.shape
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        if self._sum is None:
            self._sum = torch.zeros(groups, features, dtype=wide, device=rows.device)
            self._sumsq = torch.zeros_like(self._sum)
            self._within = torch.zeros_like(self._sum)
        elif self._sum.shape[1] != features:
            raise ValueError(
                f"{self.name}: input with {features} features after one with {self._sum.shape[1]}"
            )
        assert self._sumsq is not None
        assert self._within is not None
        self._sum += rows.sum(1, dtype=wide)
        self._sumsq += rows.square().sum(1, dtype=wide)
        if "var" in self.wanted:
            self._within += _within_sample_squares(rows, lengths).to(wide)
        if "hessian" in self.wanted:
            self._add_moment(rows, len(lengths))
        self.samples += len(lengths)
        self.tokens += count

    def _add_moment(self, rows: Tensor, new: int) -> None:
        groups, _, features = rows.shape
        if self._moment is None:
            self._moment = torch.zeros(groups, features, features, device=rows.device)
        # Running mean: the entries stay of the size of one sample however long the stream is.
        total = self.samples + new
        self._moment *= self.samples / total
        self._moment.baddbmm_(rows.transpose(1, 2) / total, rows)

    def finish(self) -> InputStats:
        """Check what was seen and return self.

        Raises:
            ValueError: the layer never ran, or its inputs hold NaN or infinity.
        """
        if self._sum is None or self._sumsq is None:
            raise ValueError(f"{self.name}: no calibration input reached this layer")
        if not bool(torch.isfinite(self._sumsq).all()):
            raise ValueError(f"{self.name}: calibration input holds NaN or infinite values")
        return self

    def _shaped(self, value: Tensor | None, what: str) -> Tensor:
        if value is None:
            raise ValueError(f"{self.name}: statistic {what!r} was not collected")
        return (value[0] if self.groups == 1 else value).float()

    @property
    def sum(self) -> Tensor:
        """Sum over all tokens, (F,) or (g, F)."""
        return self._shaped(self._sum, "sum")

    @property
    def sumsq(self) -> Tensor:
        """Sum over all tokens of the square, (F,) or (g, F)."""
        return self._shaped(self._sumsq, "sumsq")

    @property
    def mean(self) -> Tensor:
        """Mean over tokens, (F,) or (g, F)."""
        return self._shaped(None if self._sum is None else self._sum / self.tokens, "mean")

    @property
    def signed_mean(self) -> Tensor:
        """Mean over samples of the sum over tokens (DSnoT's mu), (F,) or (g, F)."""
        scaled = None if self._sum is None else self._sum / self.samples
        return self._shaped(scaled, "signed_mean")

    @property
    def norm(self) -> Tensor:
        """sqrt(mean over samples of the sum over tokens of x^2) (Wanda), (F,) or (g, F)."""
        scaled = None if self._sumsq is None else (self._sumsq / self.samples).sqrt()
        return self._shaped(scaled, "norm")

    @property
    def var(self) -> Tensor:
        """Token-weighted mean of within-sample (biased) variances, (F,) or (g, F)."""
        if "var" not in self.wanted:
            return self._shaped(None, "var")
        if self.tokens == self.samples:
            return self.pooled_var
        return self._shaped(None if self._within is None else self._within / self.tokens, "var")

    @property
    def pooled_var(self) -> Tensor:
        """Biased variance over all tokens, (F,) or (g, F)."""
        if self._sum is None or self._sumsq is None:
            return self._shaped(None, "pooled_var")
        variance = self._sumsq / self.tokens - (self._sum / self.tokens).square()
        return self._shaped(variance.clamp_min(0), "pooled_var")

    @property
    def hessian(self) -> Tensor:
        """(2/S) * sum of x x^T, (F, F) or (g, F, F)."""
        return self._shaped(None if self._moment is None else 2.0 * self._moment, "hessian")

    def per_weight(self, vector: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """A per-feature vector as a tensor that broadcasts against the layer's weight.

        Args:
            vector: (F,) or (g, F), for example `norm`.
            weight_shape: (out, in/groups, *kernel).

        Returns:
            (1, in/groups, *kernel), or (out, in/groups, *kernel) for grouped convolutions.
        """
        out, *rest = weight_shape
        if self.groups == 1:
            return vector.reshape(1, *rest)
        return vector.reshape(self.groups, *rest).repeat_interleave(out // self.groups, dim=0)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _checked_stats(stats: Collection[str]) -> frozenset[str]:
    unknown = [s for s in stats if s not in STATS]
    if unknown or not stats:
        near = get_close_matches(unknown[0], STATS, n=2) if unknown else []
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise ValueError(f"stats={sorted(stats)!r}: expected some of {', '.join(STATS)}{hint}")
    return frozenset(stats)


def _within_sample_squares(rows: Tensor, lengths: list[int]) -> Tensor:
    """Sum over tokens of (x - mean of its sample)^2, (g, F). Two-pass, so nothing cancels."""
    if len(set(lengths)) == 1:
        split = rows.unflatten(1, (len(lengths), lengths[0]))
        return (split - split.mean(2, keepdim=True)).square().sum((1, 2))
    parts = rows.split(lengths, dim=1)
    return torch.stack([(p - p.mean(1, keepdim=True)).square().sum(1) for p in parts]).sum(0)


def unfold_input(x: Tensor, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """Patches a convolution multiplies with its weight.

    Args:
        x: (batch, in, *spatial).
        conv: the layer; stride, dilation, groups and every padding mode are followed.

    Returns:
        (batch, groups, positions, in/groups * prod(kernel)), features in (channel, *kernel) order,
        so that `patches @ weight.flatten(1).T` is the convolution.
    """
    spatial = len(conv.kernel_size)
    pad = conv._reversed_padding_repeated_twice
    if any(pad):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = nn.functional.pad(x, list(pad), mode=mode)
    for axis in range(spatial):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, conv.stride[axis])[..., :: conv.dilation[axis]]
    batch, channels = x.shape[:2]
    x = x.unflatten(1, (conv.groups, channels // conv.groups))  # [b, g, c, *out, *k]
    out_dims = list(range(3, 3 + spatial))
    kernel_dims = list(range(3 + spatial, 3 + 2 * spatial))
    x = x.permute(0, 1, *out_dims, 2, *kernel_dims)
    features = channels // conv.groups * conv.weight[0, 0].numel()
    return x.reshape(batch, conv.groups, -1, features)


def _sample_slices(x: Tensor, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Iterator[Tensor]:
    taps = conv.weight[0, 0].numel()
    per_sample = max(1, x[0].numel() * taps)
    step = max(1, UNFOLD_ELEMENTS // per_sample)
    for start in range(0, x.shape[0], step):
        yield x[start : start + step]
