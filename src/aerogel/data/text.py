"""Texts as token tensors: a split of single texts, and a split of retrieval queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.data.dataset import Batch, fixed_subset


class TokenSplit(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Tokenised texts; a batch is padded to its longest text, rounded up to a multiple of 8.

    Args:
        texts: the texts, kept for people to read.
        ids: (N, T) int32 token ids, padded.
        lengths: (N,) int64 tokens of each text.
        pad_id: the padding token.
    """

    def __init__(self, texts: Sequence[str], ids: Tensor, lengths: Tensor, pad_id: int = 0) -> None:
        if not len(texts) == len(ids) == len(lengths):
            raise ValueError(f"{len(texts)} texts, {len(ids)} rows of ids, {len(lengths)} lengths")
        self.texts, self.ids, self.lengths, self.pad_id = texts, ids, lengths, pad_id

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs = self.batch(torch.tensor([index])).inputs
        return inputs[0][0], inputs[1][0]

    def batch(
        self, indices: Tensor, *, augment: str = "none", seed: int = 0, epoch: int = 0
    ) -> Batch:
        """((input_ids, attention_mask), None), both (B, T) int64. Texts are never augmented."""
        lengths = self.lengths[indices]
        longest = min(int(lengths.max() + 7) // 8 * 8, self.ids.shape[1])
        ids = self.ids[indices, :longest].long()
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return Batch((ids, mask), None)

    def subset(self, count: int) -> TokenSplit:
        """The first `count` texts of a fixed shuffle."""
        return self.take(fixed_subset(len(self), count))

    def take(self, keep: Tensor) -> TokenSplit:
        """The texts at these indices."""
        texts = [self.texts[i] for i in keep.tolist()]
        return TokenSplit(texts, self.ids[keep], self.lengths[keep], self.pad_id)


class RetrievalSplit(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Queries, documents, and for each query the index of the one document that answers it."""

    def __init__(self, queries: TokenSplit, documents: TokenSplit, relevant: Tensor) -> None:
        if relevant.shape != (len(queries),) or int(relevant.max()) >= len(documents):
            raise ValueError("relevant must give one valid document index for each query")
        self.queries, self.documents, self.relevant = queries, documents, relevant

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.queries[index]

    def subset(self, count: int) -> RetrievalSplit:
        """The first `count` queries of a fixed shuffle, against all of their documents."""
        keep = fixed_subset(len(self), count)
        wanted, relevant = self.relevant[keep].unique(return_inverse=True)
        return RetrievalSplit(self.queries.take(keep), self.documents.take(wanted), relevant)


def load_tokenizer(path: Path, max_length: int | None = None) -> Any:
    """A `tokenizers.Tokenizer` from a tokenizer.json, truncating at `max_length` tokens if given.

    Raises:
        ModuleNotFoundError: the package `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "text data sets need the package tokenizers: pip install 'aerogel[text]'"
        ) from error
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    if max_length is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(max_length)
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str], pad_id: int = 0) -> TokenSplit:
    """Tokenise texts into one padded int32 tensor."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    lengths = torch.tensor([len(ids) for ids in encoded], dtype=torch.int64)
    longest = int(lengths.max()) if len(lengths) else 0
    rows = [ids + [pad_id] * (longest - len(ids)) for ids in encoded]
    return TokenSplit(texts, torch.tensor(rows, dtype=torch.int32), lengths, pad_id)


def token_windows(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Running text as equal windows, as language models are calibrated and scored on.

    Args:
        tokenizer: a `tokenizers.Tokenizer` that does not truncate.
        texts: documents, joined by an empty line.
        length: tokens in a window.

    Returns:
        (windows, length) int64 token ids; what does not fill a last window is left out.

    Raises:
        ValueError: length below 1, or texts of fewer tokens than one window.
    """
    if length < 1:
        raise ValueError(f"length={length!r} must be >= 1")
    ids = tokenizer.encode("\n\n".join(texts)).ids
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"texts have {len(ids)} tokens, fewer than one window of length={length}")
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
