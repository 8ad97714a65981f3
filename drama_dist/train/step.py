"""The training step: the only definition of what lies between a batch of texts and updated weights.

Tokenise this rank's share, encode it with the gradient cache, ask the objective for gradients, take them back through
the encoder, and let the optimiser step; and how these parts are made from the settings. The loop, the tests on several
ranks and the benchmarks call it. Which texts make up a batch is in batches.py, what a step costs in telemetry.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from drama_dist.distributed import ranks
from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.distributed.precision import agreed_dtype_name
from drama_dist.encoder.backbone import Encoder
from drama_dist.encoder.cut_texts import CutTexts, counting
from drama_dist.kernels import TeacherScores
from drama_dist.settings import TrainSettings
from drama_dist.train.batches import TextBatch
from drama_dist.train.grad_cache import GradCache
from drama_dist.train.objective import Objective, objective_terms
from drama_dist.train.target_vectors import VectorTargets
from drama_dist.train.targets import Targets
from drama_dist.train.term import EmbeddedBatch, Relevance, TargetVectors, TermResult


@dataclass(frozen=True)
class StepResult:
    """objective: of the global batch. gradient_norm: of all weights, before clipping. lengths: of the sequences that
    this rank encoded, in tokens; of these tokens the `recomputed` share was encoded twice. queries_cut, passages_cut:
    what was cut of this rank's texts.
    """

    objective: TermResult
    gradient_norm: float
    lengths: list[int]
    recomputed: float
    queries_cut: CutTexts = field(default_factory=CutTexts)
    passages_cut: CutTexts = field(default_factory=CutTexts)


class TrainingStep:
    """An encoder under training, with its optimiser, gradient cache and objective; all ranks call it alike."""

    def __init__(
        self,
        encoder: Encoder,
        settings: TrainSettings,
        scores: Targets | None = None,
        vectors: VectorTargets | None = None,
    ):
        """scores, vectors: the teacher's, where the settings ask for them."""
        self.scores, self.vectors = scores, vectors
        ranks.start()  # they agree on a dtype before there is an engine
        self.encoder, self.dtype = encoder, agreed_dtype_name(settings.dtype)
        self.engine = Engine(
            encoder,
            OptimiserSettings(
                self.dtype,
                zero_stage=settings.zero_stage,
                weight_decay=settings.weight_decay,
                gradient_clipping=settings.gradient_clipping,
                offload=settings.offload_optimizer,
                embedding_rate=settings.embedding_rate,
            ),
        )
        encoder.train()
        if settings.checkpoint_layers:
            encoder.checkpoint_layers()
        budget = None if settings.activation_budget == "auto" else float(settings.activation_budget) * 2**30
        self.cache = GradCache(encoder, self.engine, settings.chunk_tokens, budget)
        # An encoder in bfloat16 knows its embeddings no better: docs/loss.md has the errors.
        rounded = self.dtype == "bfloat16"
        self.objective = Objective(objective_terms(encoder.contract, settings, rounded))

    def __call__(self, batch: TextBatch, learning_rate: float) -> StepResult:
        """One step on this rank's share of a global batch. Raises FloatingPointError as Engine.step does."""
        queries = [batch.queries[row] for row in ranks.rank_slice(len(batch.queries))]
        passages = [batch.passages[column] for column in ranks.rank_slice(len(batch.passages))]
        with counting() as queries_cut:
            query_tokens = self.encoder.tokenize_queries(queries)
        with counting() as passages_cut:
            passage_tokens = self.encoder.tokenize_passages(passages)
        device = self.encoder.device
        teacher = None if self.scores is None else self.scores.of(batch).to(device)
        targets = None if self.vectors is None else self.vectors.of(batch).to(device)
        result = self.of_tokens(query_tokens, passage_tokens, batch.relevance, learning_rate, teacher, targets)
        return replace(result, queries_cut=queries_cut, passages_cut=passages_cut)

    def of_tokens(
        self,
        queries: Sequence[list[int]],
        passages: Sequence[list[int]],
        relevance: Relevance,
        learning_rate: float,
        teacher: TeacherScores | None = None,
        targets: TargetVectors | None = None,
    ) -> StepResult:
        """The same from the token ids of this rank's queries and passages, and what the teacher says of them."""
        encoded = self.cache.encode([*queries, *passages])
        embeddings_NK = encoded.embeddings_NK
        queries_BK, passages_NK = embeddings_NK[: len(queries)], embeddings_NK[len(queries) :]
        relevance = relevance.to(self.encoder.device)
        objective = self.objective(EmbeddedBatch(queries_BK, passages_NK, relevance, teacher, targets))
        self.cache.backward(torch.cat([objective.query_gradient_BK, objective.passage_gradient_NK]))
        return StepResult(objective, self.engine.step(learning_rate), encoded.lengths, encoded.recomputed)
