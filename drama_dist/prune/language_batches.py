"""Language-weighted batches: which texts a step of masks or healing reads.

Dynamic batch loading (Sheared LLaMA, Xia et al. 2024, arXiv 2310.06694, section 2.2 and algorithm 1): a language whose
loss is still far above the LLM's own is drawn more often. They weight domains, by losses on held-out texts; here the
losses are those of the steps since the last update, which cost nothing extra. So that every language is drawn, and
measured, its share has a lower bound. Covers drawing, the update, the LLM's losses, and what checkpoints keep; not the
steps themselves. Where one language has texts they are drawn evenly, and nothing is measured.
Shapes: L languages, S scored tokens of a chunk.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import one_hot

from drama_dist.distributed import ranks
from drama_dist.encoder.families import LanguageModel
from drama_dist.prune.language_loss import Chunk, chunked, share_of_this_rank, token_losses
from drama_dist.run.progress import progress_bar

_UPDATE_EVERY = 25  # steps, of which there are some hundreds; 50 of 3,200 in their pruning
_LEAST = 0.2  # of a language's share of the texts
_REFERENCE_TEXTS = 32  # of a language, at most


class LanguageBatches:
    """The texts of masks or healing, and the languages' shares of them; all ranks make every call.

    shares: by which each text of a step is drawn; at first those of the texts. Texts without a next token to predict do
    not count, and are not drawn where there are several languages.
    """

    def __init__(self, sequences: Sequence[list[int]], languages: Sequence[str]):
        self._sequences, self._languages = sequences, languages
        texts: dict[str, list[int]] = {language: [] for language in sorted(set(languages))}
        for index, language in enumerate(languages):
            if len(sequences[index]) > 1:
                texts[language].append(index)
        self._texts = {language: indices for language, indices in texts.items() if indices}
        self._number = {language: number for number, language in enumerate(self._texts)}
        self._several = len(self._texts) > 1
        total = sum(map(len, self._texts.values()))
        self.shares = {language: _rounded(len(indices) / total) for language, indices in self._texts.items()}
        self._least = {language: _LEAST * share for language, share in self.shares.items()}
        self._reference: dict[str, float] = {}
        self._sums_L2 = torch.zeros(len(self._texts), 2, dtype=torch.float64)  # losses and tokens since the last update
        self._of_step_L2 = torch.zeros_like(self._sums_L2, device=ranks.device())  # of this rank alone

    def chunks(self, tokens: int, scored_share: float, seed: str) -> list[Chunk]:
        """A step's chunks, the same on every rank.

        tokens: so many, or a few more, or fewer where the step has had as many texts as there are. seed: of the step.
        """
        generator = random.Random(seed)
        order = self._by_shares(generator) if self._several else self._evenly(generator, tokens)
        texts = ((self._sequences[index], self._languages[index]) for index in order)
        return chunked(texts, tokens, scored_share, generator)

    @torch.no_grad()
    def measure(self, source: LanguageModel) -> None:
        """Measure the mean losses of the LLM, which nothing has been cut from, on some texts of each language.

        Those that a checkpoint has replace them. Not called inside `interrupts.deferred`: it may take as long as many
        steps, and would hold up a signal.
        """
        if not self._several:
            return
        drawn = [text for texts in self._texts.values() for text in texts[:: math.ceil(len(texts) / _REFERENCE_TEXTS)]]
        texts = [(self._sequences[index], self._languages[index]) for index in drawn]
        chunks = chunked(texts, sum(len(ids) for ids, _ in texts), 1.0, random.Random(0))
        share = list(share_of_this_rank(chunks))
        bar = progress_bar(len(share), "losses of the LLM by language", "chunks")
        for chunk, weight in share:
            self.count(chunk, token_losses(source, chunk), weight)
            bar.update(1)
        bar.close()
        self._sum_over_ranks()
        self._reference = self._take_means()

    def count(self, chunk: Chunk, losses_S: torch.Tensor, weight: float) -> None:
        """Add the losses of a chunk's scored tokens to their languages'. weight: as `share_of_this_rank` has it."""
        if self._several:
            of_position = [
                self._number[name] for name, ids in zip(chunk.languages, chunk.sequences, strict=True) for _ in ids
            ]
            languages_S = torch.tensor([of_position[position] for position in chunk.scored], device=losses_S.device)
            is_of_SL = one_hot(languages_S, len(self._number)).double()
            counted_S2 = torch.stack([losses_S.detach().double(), torch.ones_like(losses_S).double()], 1)
            self._of_step_L2 += weight * (is_of_SL.T @ counted_S2)

    def finish_step(self, step: int) -> dict[str, Any]:
        """Update the shares after some steps, counted from 0. Returns those it was drawn by, for metrics.jsonl."""
        if not self._several:
            return {}
        held = self.shares
        self._sum_over_ranks()
        if (step + 1) % _UPDATE_EVERY == 0:
            self.shares = updated(self.shares, self._take_means(), self._reference, self._least)
        return {"language_shares": held}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, which may fall between two updates; JSON values."""
        return {"shares": self.shares, "reference": self._reference, "sums": self._sums_L2.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint has."""
        self.shares, self._reference = state["shares"], state["reference"]
        self._sums_L2 = torch.tensor(state["sums"], dtype=torch.float64).reshape(self._sums_L2.shape)

    def _evenly(self, generator: random.Random, most: int) -> Iterator[int]:
        count = len(self._sequences)
        yield from generator.sample(range(count), min(count, most))  # each has a token

    def _by_shares(self, generator: random.Random) -> Iterator[int]:
        """As many texts as there are; one comes again when all of its language have come."""
        left: dict[str, list[int]] = {}
        languages, shares = list(self.shares), list(self.shares.values())
        for _ in self._sequences:
            (language,) = generator.choices(languages, shares)
            texts = left[language] = left.get(language) or list(self._texts[language])
            index = generator.randrange(len(texts))
            texts[index], texts[-1] = texts[-1], texts[index]
            yield texts.pop()

    def _sum_over_ranks(self) -> None:
        self._sums_L2 += ranks.sum_over_ranks(self._of_step_L2).cpu()
        self._of_step_L2.zero_()

    def _take_means(self) -> dict[str, float]:
        """Mean losses since the last call, of languages with a scored token."""
        sums = zip(self._number, self._sums_L2.tolist(), strict=True)
        means = {language: loss / tokens for language, (loss, tokens) in sums if tokens}
        self._sums_L2.zero_()
        return means


def updated(
    shares: Mapping[str, float],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    least: Mapping[str, float],
) -> dict[str, float]:
    """The shares times exp(max(loss − reference, 0)), normalised (algorithm 1, its UpdateWeight).

    A language without a loss, of which no token was scored, keeps its share. Then what is below `least` is raised to
    it, and all are normalised again: the paper has no such bound, and shares could not come back from 0.
    """
    excess = {language: max(loss - reference[language], 0.0) for language, loss in losses.items()}
    most = max(excess.values())  # without it, exp could overflow
    grown = {language: shares[language] * math.exp(each - most) for language, each in excess.items()}
    kept = {language: share for language, share in shares.items() if language not in losses}
    scale = (1 - sum(kept.values())) / sum(grown.values())
    raised = {
        language: max(kept[language] if language in kept else grown[language] * scale, least[language])
        for language in shares
    }
    total = sum(raised.values())
    return {language: _rounded(share / total) for language, share in raised.items()}


def _rounded(share: float) -> float:
    """Four significant digits: in float32, the others depend on the order in which ranks' sums are added up."""
    return float(f"{share:.4g}")
