"""Cache layers that attend themselves, because they do not hold all keys side by side."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor

from aerogel.attention.softmax import apply_sink


class CacheCall(NamedTuple):
    """What a call asks for besides queries, keys and values.

    Attributes:
        scale: factor of the logits.
        window: tokens of the model's own sliding window, or None.
        softcap: logits become ``softcap * tanh(logit / softcap)``, or None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class AttendingCache:
    """Mixed into a cache layer, whose `attend` then replaces the engine's call on that layer.

    A subclass gives `_attend`, and names in `refused` what it does not know.
    """

    refused: ClassVar[tuple[str, ...]] = ("window",)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sink_logit: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Attention of new tokens to all that are stored, themselves included; after `update`.

        Args:
            q: (B, Hq, n, D).
            k: (B, Hkv, n, D) the new keys.
            v: (B, Hkv, n, Dv) the new values.
            scale: as `aerogel.attention.attend`.
            window: the same.
            softcap: the same.
            sink_logit: the same.
            dropout_p: 0.

        Returns:
            (B, Hq, n, Dv).

        Raises:
            ValueError: dropout, or an option that this cache does not know.
        """
        options = {"window": window, "softcap": softcap, "sink_logit": sink_logit}
        given = [name for name in self.refused if options[name] is not None]
        if given or dropout_p:
            given += ["dropout_p"] * bool(dropout_p)
            raise ValueError(f"{', '.join(given)}: expected none with a {type(self).__name__}")
        call = CacheCall(q.shape[-1] ** -0.5 if scale is None else scale, window, softcap)
        o, lse = self._attend(q, k, v, call)
        return o if sink_logit is None else apply_sink(o, lse, sink_logit)[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: CacheCall) -> tuple[Tensor, Tensor]:
        """o (B, Hq, n, Dv) and lse (B, Hq, n)."""
        raise NotImplementedError
