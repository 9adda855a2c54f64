"""Probes of what a language model finds again: a needle in a haystack, the value of a key.

A probe is a prompt and the one right continuation, in tokens. The prompt goes through the model in
one prefill, the answer token by token through the KV cache, so that a probe sees both what sparse
prefill lost and what sparse decoding misses.

Reference: Kamradt, "Needle in a haystack", 2023; Liu et al., "Lost in the Middle" (key-value
retrieval), arXiv 2307.03172.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PLACES = ("Lisbon", "Nairobi", "Osaka", "Quito", "Tallinn", "Perth", "Dakar", "Bergen")
_DIGITS, _KEY_LETTERS = 6, 6
_HEX = "0123456789abcdef"


class Probe(NamedTuple):
    """A prompt and what should follow.

    Attributes:
        prompt: (length,) int64.
        answer: (n,) int64.
        depth: where in the prompt the answer stands: 0 at the beginning, 1 at the end.
    """

    prompt: Tensor
    answer: Tensor
    depth: float


class Recall(NamedTuple):
    """How well a model does on probes.

    Attributes:
        accuracy: share of probes all of whose answer tokens were the model's first choice.
        nats: mean loss of an answer token.
    """

    accuracy: float
    nats: float


def needle_probe(
    encode: Encode, haystack: Tensor, length: int, depth: float, seed: int = 0
) -> Probe:
    """A sentence with a number inside a text, asked for at its end.

    Args:
        encode: the model's tokenizer.
        haystack: (n,) token ids of text, n >= length.
        length: tokens of the prompt.
        depth: where the sentence stands, from 0 to 1.
        seed: of place, number and of the piece of text.

    Raises:
        ValueError: the prompt has no room for sentence and question, the text is shorter than it,
            or depth is out of range.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: expected a number from 0 to 1")
    draw = random.Random(seed)
    place = draw.choice(_PLACES)
    fact = encode(f"\nThe secret number of {place} is")
    answer = encode(" " + "".join(draw.choices("0123456789", k=_DIGITS)))
    end = encode(".\n")
    room = length - 2 * len(fact) - len(answer) - len(end)
    if room < 0 or len(haystack) < room:
        raise ValueError(
            f"length={length}: expected at least {length - room}, and a haystack of as many tokens "
            f"(it has {len(haystack)})"
        )
    first = draw.randrange(len(haystack) - room + 1)
    text = haystack[first : first + room].tolist()
    cut = round(depth * room)
    prompt = [*text[:cut], *fact, *answer, *end, *text[cut:], *fact]
    return Probe(torch.tensor(prompt), torch.tensor(answer), depth)


def key_value_probe(encode: Encode, length: int, depth: float, seed: int = 0) -> Probe:
    """Lines of random keys and values, and one key again at the end.

    Args:
        encode: the model's tokenizer.
        length: tokens of the prompt; the end of one more line fills it up at the front.
        depth: which line is asked for, from 0 (the first whole one) to 1 (the last).
        seed: of keys and values.

    Raises:
        ValueError: there is no room for two lines, or depth is out of range.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: expected a number from 0 to 1")
    draw = random.Random(seed)

    def drawn() -> str:
        return "".join(draw.choices(_HEX, k=_KEY_LETTERS))

    lines: list[tuple[list[int], list[int]]] = []
    used, longest, end = 0, 0, encode('"\n')
    while True:
        key, value = encode(f'"{drawn()}": "'), encode(drawn())
        longest = max(longest, len(key))
        line = [*key, *value, *end]
        # All that stands before a value is what asks for it.
        if used + len(line) + longest > length:
            break
        lines.append((key, value))
        used += len(line)
    if len(lines) < 2:
        raise ValueError(f"length={length}: expected at least {2 * len(line) + longest}")
    asked, answer = lines[round(depth * (len(lines) - 1))]
    body = [token for key, value in lines for token in (*key, *value, *end)]
    room = length - len(body) - len(asked)
    cut = (2 * line)[len(2 * line) - room :]  # of a line that nobody asks for
    return Probe(torch.tensor([*cut, *body, *asked]), torch.tensor(answer), depth)


@torch.no_grad()
def ask(
    model: nn.Module,
    probes: Sequence[Probe],
    *,
    make_cache: Callable[[], Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Recall:
    """Put probes to a model, one at a time.

    Args:
        model: a transformers causal model, with whatever attention; its mode is restored.
        probes: prompts and answers.
        make_cache: makes the KV cache of a prompt; default transformers' own.
        on_progress: called as (probes_done, probes_total).

    Raises:
        ValueError: there are no probes.
    """
    if not probes:
        raise ValueError("probes: expected at least one")
    was_training = model.training
    model.eval()
    right, losses = 0, []
    try:
        for done, probe in enumerate(probes, 1):
            logits = _answer_logits(model, probe, None if make_cache is None else make_cache())
            right += bool((logits.argmax(-1) == probe.answer).all())
            losses.append(F.cross_entropy(logits, probe.answer))
            if on_progress is not None:
                on_progress(done, len(probes))
    finally:
        model.train(was_training)
    return Recall(right / len(probes), float(torch.stack(losses).mean()))


def _answer_logits(model: nn.Module, probe: Probe, cache: Any) -> Tensor:
    """(n, vocabulary) float32 logits of the answer's tokens, on the CPU."""
    device = next(model.parameters()).device
    rows, feed = [], probe.prompt
    for token in probe.answer:
        output = model(
            input_ids=feed[None].to(device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        rows.append(output.logits[0, -1].float().cpu())
        cache, feed = output.past_key_values, token[None]
    return torch.stack(rows)
