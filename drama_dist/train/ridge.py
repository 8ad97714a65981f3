"""The ridge stage: RUN/ridge, the pruned LLM with token embeddings and a linear head in closed form.

Training by regression begins from it. Without any training it is a retriever, the system `ridge`: training that does
not beat it is worth nothing. Its vectors are sums of token vectors, which token_vectors.py fits to the targets of
training queries and passages; token_start.py puts them into the backbone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack
from transformers import PreTrainedTokenizerBase

from drama_dist.corpus.collection import PassageTable, open_collection
from drama_dist.distributed import ranks
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.contract import tokens_before, wire_tokenizer, with_dims_within
from drama_dist.encoder.cut_texts import counting
from drama_dist.encoder.superwords import add_superwords
from drama_dist.records import Example, read_records
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import TRAINING_TEXTS
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.train.target_fit import FITTED
from drama_dist.train.target_vectors import VectorTargets
from drama_dist.train.token_start import append_embeddings, put_token_vectors
from drama_dist.train.token_vectors import token_counts, token_vectors

_BLOCK = 4096  # texts that are tokenised at once


def ridge(run: Run, folder: StageFolder, system: str) -> None:
    """Do the stage, which rank 0 does alone; system: ridge."""
    facts: dict[str, Any] = {}
    ranks.by_rank_0(lambda: facts.update(_write(run, folder)))
    folder.finish(**facts)


def in_closed_form(run: Run, start: Encoder) -> tuple[Encoder, dict[str, Any]]:
    """An encoder of the same backbone with fitted token vectors, and the run's contract; and a record of the fit.

    start: is changed, its embeddings, layers and tokenizer; its own head and contract are not used.
    """
    settings, backbone = run.settings, start.backbone
    examples = read_records(run.path("augment") / "examples.jsonl", Example.from_json)
    table = open_collection(run.path(TRAINING_TEXTS)).passages
    queries, passages = (_drawn(len(texts), settings.seed) for texts in (examples, table))
    tokenizer = wire_tokenizer(start.tokenizer, settings.encoder.lower_case)
    parts = _superwords(tokenizer, table, passages, settings.train.superwords, backbone.config.vocab_size)
    size, before = backbone.config.vocab_size + len(parts), tokens_before(tokenizer)
    plain = Encoder(backbone, tokenizer, with_dims_within(settings.encoder, start.hidden_size))
    say(f"ridge: fitting the vectors of tokens to {len(queries)} queries and {len(passages)} passages")
    with counting() as cut_queries:
        of_queries = ([examples[row].query for row in block] for block in _blocks(queries))
        in_queries = _counts(map(plain.tokenize_queries, of_queries), size, before)
    with counting() as cut_passages:
        of_passages = (table.contents(block) for block in _blocks(passages))
        in_passages = _counts(map(plain.tokenize_passages, of_passages), size, before)
    targets = VectorTargets.open(run.path("targets"))
    vectors_VJ = token_vectors(
        (in_queries, targets.queries.rows(queries)),
        (in_passages, targets.passages.rows(passages)),
        backbone.embed_tokens.weight.detach().float().cpu().numpy(),
        parts,
    )
    around = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    vectors_VJ[[*around]] = 0  # every text has them, and none is about them
    append_embeddings(backbone, parts)
    counts_V = np.asarray(in_queries.sum(0) + in_passages.sum(0)).ravel()
    head = put_token_vectors(backbone, vectors_VJ, counts_V)
    fitted = Encoder(backbone, tokenizer, settings.encoder, head.to(start.device))
    cut = {"queries": asdict(cut_queries), "passages": asdict(cut_passages)}
    facts = {"queries": len(queries), "passages": len(passages), "tokens": int((counts_V > 0).sum())}
    return fitted, {**facts, "superwords": len(parts), "cut": cut}


def _superwords(
    tokenizer: PreTrainedTokenizerBase, table: PassageTable, passages: Sequence[int], most: int, first_id: int
) -> list[list[int]]:
    """See add_superwords."""
    if most:
        say(f"ridge: learning superwords from {len(passages)} passages")
    texts = chain.from_iterable(table.contents(block) for block in _blocks(passages))
    return add_superwords(tokenizer, texts, most, first_id)


def _blocks(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    return (rows[begin : begin + _BLOCK] for begin in range(0, len(rows), _BLOCK))


def _counts(tokenized: Iterable[list[list[int]]], vocabulary: int, before: int) -> csr_matrix:
    """The tokens of texts, which come block by block."""
    return csr_matrix(vstack([token_counts(block, vocabulary, before) for block in tokenized]))


def _write(run: Run, folder: StageFolder) -> dict[str, Any]:
    fitted, facts = in_closed_form(run, load(run.settings.train.start or run.path("prune")))
    fitted.save(folder.folder)
    return facts


def _drawn(count: int, seed: int) -> list[int]:
    return sorted(random.Random(f"{seed} ridge").sample(range(count), min(count, FITTED)))
