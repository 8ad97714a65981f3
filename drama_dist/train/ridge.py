"""The ridge stage: RUN/ridge, the pruned LLM with the linear head that regression begins from, in closed form.

The head is the ridge regression (Hoerl and Kennard 1970) from pooled hidden states to the targets, over a sample of
training queries and passages. Without any training this is a retriever, the system `ridge`: training that does not beat
it is worth nothing.
Shapes: n texts, K hidden components, J components of the targets.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from drama_dist.corpus.collection import open_collection
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import AUTO, dtype_name
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.contract import with_dims_within
from drama_dist.encoder.cut_texts import counting
from drama_dist.encoder.head import LinearHead
from drama_dist.encoder.packing import token_budget_chunks
from drama_dist.records import Example, read_records
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import TRAINING_TEXTS
from drama_dist.run.progress import progress_bar, say
from drama_dist.run.runner import Run
from drama_dist.train.target_vectors import VectorTargets

_QUERIES, _PASSAGES = 8192, 4096  # that a head is fitted to
_HELD_OUT = 10  # of so many one chooses the penalty
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in mean variances of the states
_CHUNK_TOKENS = 4096


def ridge(run: Run, folder: StageFolder, system: str) -> None:
    """Do the stage, which rank 0 does alone; system: ridge."""
    facts: dict[str, Any] = {}
    ranks.by_rank_0(lambda: facts.update(_write(run, folder)))
    folder.finish(**facts)


def with_ridge_head(run: Run, start: Encoder) -> tuple[Encoder, dict[str, Any]]:
    """An encoder of the same backbone with a fitted head, and the run's contract; and what is recorded of the fit.

    start: is changed: it loses its own head, since the new one maps pooled states, and gets a contract without it.
    """
    settings = run.settings
    examples = read_records(run.path("augment") / "examples.jsonl", Example.from_json)
    table = open_collection(run.path(TRAINING_TEXTS)).passages
    queries, passages = _sample(len(examples), len(table), settings.seed)
    start.head = None
    start.contract = with_dims_within(settings.encoder, start.size)
    with counting() as cut_queries:
        texts = start.tokenize_queries([examples[row].query for row in queries])
    with counting() as cut_passages:
        texts += start.tokenize_passages(table.contents(passages))
    targets = VectorTargets.open(run.path("targets"))
    targets_nJ = torch.from_numpy(np.vstack([targets.queries.rows(queries), targets.passages.rows(passages)]))
    known_n = targets_nJ.any(dim=1)  # without the teacher a text without a word has no target
    states_nK, targets_nJ = _pooled(start, texts)[known_n], targets_nJ[known_n]
    penalty = chosen_penalty(states_nK, targets_nJ, settings.seed)
    say(f"ridge: penalty {penalty:g} of {len(states_nK)} states' mean variance")
    fitted = Encoder(start.backbone, start.tokenizer, settings.encoder, fitted_head(states_nK, targets_nJ, penalty))
    cut = {"queries": asdict(cut_queries), "passages": asdict(cut_passages)}
    return fitted, {"penalty": penalty, "texts": len(states_nK), "cut": cut}


def chosen_penalty(states_nK: torch.Tensor, targets_nJ: torch.Tensor, seed: int) -> float:
    """The penalty with which vectors of held-out rows, made of length 1, are nearest to their targets.

    targets_nJ: of length 1.
    """
    states_nK, targets_nJ = states_nK.double(), targets_nJ.double()
    order_n = torch.randperm(len(states_nK), generator=torch.Generator().manual_seed(seed))
    held_out = order_n[: max(1, len(order_n) // _HELD_OUT)]
    rest = order_n[len(held_out) :]
    errors = []
    for penalty in _PENALTIES:
        weight_KJ, bias_J = solution(states_nK[rest], targets_nJ[rest], penalty)
        difference_nJ = normalize(states_nK[held_out] @ weight_KJ + bias_J) - targets_nJ[held_out]
        errors.append(float(difference_nJ.norm(dim=1).mean()))
    return _PENALTIES[errors.index(min(errors))]


def fitted_head(states_nK: torch.Tensor, targets_nJ: torch.Tensor, penalty: float) -> LinearHead:
    """The ridge regression from states to targets, solved in float64; float32."""
    weight_KJ, bias_J = solution(states_nK.double(), targets_nJ.double(), penalty)
    head = LinearHead(*weight_KJ.shape)
    head.load_state_dict({"weight": weight_KJ.T, "bias": bias_J})
    return head


def solution(states_nK: torch.Tensor, targets_nJ: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """W, K × J, and b that are least in |X W + b − Y|² + λ |W|², where λ = penalty · n · trace(cov X) / K."""
    mean_K, mean_J = states_nK.mean(0), targets_nJ.mean(0)
    centred_nK = states_nK - mean_K
    products_KK = centred_nK.T @ centred_nK
    products_KK.diagonal().add_(penalty * products_KK.trace() / len(products_KK))
    weight_KJ = torch.linalg.solve(products_KK, centred_nK.T @ (targets_nJ - mean_J))
    return weight_KJ, mean_J - mean_K @ weight_KJ


def _write(run: Run, folder: StageFolder) -> dict[str, Any]:
    settings, dtype = run.settings, dtype_name(AUTO)
    start = settings.train.start or run.path("prune")
    fitted, facts = with_ridge_head(run, load(start, dtype=dtype))
    encoder = load(start)  # float32: states in bfloat16 are enough to fit, not to start from
    Encoder(encoder.backbone, encoder.tokenizer, settings.encoder, fitted.head).save(folder.folder)
    return {"dtype": dtype, **facts}


def _sample(queries: int, passages: int, seed: int) -> tuple[list[int], list[int]]:
    chance = random.Random(f"{seed} ridge")
    return tuple(  # type: ignore[return-value]
        sorted(chance.sample(range(count), min(count, most)))
        for count, most in ((queries, _QUERIES), (passages, _PASSAGES))
    )


@torch.no_grad()
def _pooled(encoder: Encoder, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Pooled states of texts, which are lists of token ids; float32 (n, K), on the CPU."""
    states_nK = torch.empty(len(texts), encoder.size)
    bar = progress_bar(len(texts), "ridge", "texts")
    for chunk in token_budget_chunks([len(ids) for ids in texts], _CHUNK_TOKENS):
        states_nK[chunk] = encoder(encoder.pack([texts[row] for row in chunk]))[: len(chunk)].cpu()
        bar.update(len(chunk))
    bar.close()
    return states_nK
