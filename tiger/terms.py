"""How often each term occurs, and the attention weight of each token that follows from it (paper eq. 9-10)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from tiger.attention import term_weight
from tiger.tokenizer import MAX_LENGTH

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from tiger.knowledge import Knowledge

OTHER = 1.0  # δ of every token that belongs to no particular or joint term


class TermFrequencies:
    """How often each canonical term occurred: of one global batch, or of the whole training, for inference."""

    def __init__(self, counts: Mapping[str, int] | None = None):
        self.counts = Counter(counts or {})

    @classmethod
    def of(cls, texts: Iterable[str], knowledge: Knowledge) -> TermFrequencies:
        """Count every term, of any class, in `texts`: the FG prompts, for only their terms are weighted."""
        return cls(Counter(span.term for text in texts for span in knowledge.term_classes(text)))

    def update(self, other: TermFrequencies) -> None:
        """Add the counts of `other`."""
        self.counts.update(other.counts)

    def tau(self, term: str) -> float:
        """Equation 10: occurrences of the term / all terms, in [0, 1]. 0 for a term never seen: the rarest of all."""
        return self.counts[term] / max(self.counts.total(), 1)


def token_weights(
    texts: Sequence[str], tokenizer: CLIPTokenizer, knowledge: Knowledge, frequencies: TermFrequencies
) -> torch.Tensor:
    """ω for each token of each FG prompt: (B, 77) float32.

    A term's weight goes to all its subword tokens. Begin, end and padding tokens are "every other token" (δ = 1, ω =
    0.633) too: a weight of 1 would lift them above the ordinary words. Tokens cut off at 77 have no weight.
    """
    encoded = tokenizer(
        list(texts), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_offsets_mapping=True
    )
    weights = torch.full((len(texts), MAX_LENGTH), term_weight(OTHER))
    for row, (text, offsets) in enumerate(zip(texts, encoded["offset_mapping"], strict=True)):
        for index, delta in token_deltas(text, offsets, knowledge, frequencies).items():
            weights[row, index] = term_weight(delta)
    return weights


def token_deltas(
    text: str, offsets: Sequence[tuple[int, int]], knowledge: Knowledge, frequencies: TermFrequencies
) -> dict[int, float]:
    """Token index -> δ, for the tokens of particular (0) and joint (τ) terms.

    offsets: the span of characters in `text` that each token covers; special tokens have the empty span (0, 0), which
    meets no term.
    """
    deltas = {}
    for span in knowledge.term_classes(text):
        if span.kind == "common":
            continue
        delta = 0.0 if span.kind == "particular" else frequencies.tau(span.term)
        for index, (start, end) in enumerate(offsets):
            if start < span.end and end > span.start:
                deltas[index] = delta
    return deltas
