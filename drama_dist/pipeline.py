"""The whole job, stage by stage: which stage needs which, and with what inputs.

Each function runs one stage (and says so when its artefact is there already); `run` runs all.
Stages know each other only through the run's folder. What a stage does is in its own room.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from drama_dist.augment.stage import augment as write_examples
from drama_dist.corpus.collection import Corpus, open_corpus
from drama_dist.corpus.stage import build_corpus
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import dtype_name
from drama_dist.encoder.backbone import load
from drama_dist.encoder.sources import model_fingerprint
from drama_dist.evaluate.report import results_table, write_report
from drama_dist.evaluate.scoring import score_system
from drama_dist.export.stage import export_encoder
from drama_dist.prune.stage import prune as build_backbone
from drama_dist.prune.stage import random_twin
from drama_dist.run.folder import CHECKPOINTS, fingerprint, open_stage, write_text
from drama_dist.run.progress import say
from drama_dist.run.shares import WHOLE, Share
from drama_dist.search.lexical import build_lexical_index
from drama_dist.search.shards import EmbeddingShards, TextEncoder, write_shards
from drama_dist.search.teacher import Teacher
from drama_dist.settings import OTHER_MODEL, Settings, as_dict, write_settings
from drama_dist.train.loop import train as train_encoder

TRAINED = {"drama": "train", "random-init": "train-random-init"}


def corpus(settings: Settings) -> Path:
    """Read, clean and store the corpus: RUN/corpus."""
    if ranks.rank() == 0:
        write_settings(settings, Path(settings.run) / "settings.yaml")
    return build_corpus(settings)


def prune(settings: Settings) -> Path:
    """Cut the LLM down to a small encoder: RUN/prune."""
    folder = corpus(settings)
    inputs = {"corpus": fingerprint(folder), "llm": model_fingerprint(settings.llm)}
    return build_backbone(settings, open_corpus(folder).passages, inputs)


def augment(settings: Settings, share: Share = WHOLE) -> Path:
    """Write training examples: RUN/augment, or one task's share of the synthetic queries."""
    if not share.whole:
        _need(settings, "corpus", "drama corpus SETTINGS")
        _need(settings, "encode/teacher", "drama encode SETTINGS --system teacher")
    folder = corpus(settings)
    ranked_by = encode(settings, "teacher")
    inputs = {"corpus": fingerprint(folder), "teacher": fingerprint(ranked_by), "llm": model_fingerprint(settings.llm)}
    teacher = Teacher(settings.teacher, settings.trust_remote_code)
    return write_examples(settings, open_corpus(folder), teacher, ranked_by, inputs, share)


def train(settings: Settings, system: str = "drama") -> Path:
    """Train the pruned encoder (RUN/train) or its randomly initialised twin (RUN/train-random-init)."""
    folder, examples = corpus(settings), augment(settings)
    source = settings.train.start or str(prune(settings))
    inputs = {"corpus": fingerprint(folder), "augment": fingerprint(examples), "start": model_fingerprint(source)}
    start = load(source, contract=settings.encoder)
    if system == "random-init":
        start = random_twin(start, settings.seed)
    return train_encoder(settings, TRAINED[system], start, examples, open_corpus(folder).passages, inputs)


def encode(settings: Settings, system: str = "drama", share: Share = WHOLE) -> Path:
    """Encode the corpus with one system: RUN/encode/SYSTEM, or one task's share of its shards."""
    if not share.whole:
        _need(settings, "corpus", "drama corpus SETTINGS")
        if system in TRAINED:
            for needed in ("encode/teacher", "augment", *([] if settings.train.start else ["prune"]), TRAINED[system]):
                _need(settings, needed, "drama train SETTINGS")
    folder = corpus(settings)
    sections, inputs = _encoding(settings, system)
    name = f"encode/{result_name(system)}"
    stage = open_stage(settings.run, name, sections, {"corpus": fingerprint(folder), **inputs}, share)
    if not stage.done:
        encoder = _encoder(settings, system)
        dtype = dtype_name(settings.teacher.dtype if system == "teacher" else settings.encode.dtype)
        passages, rows = open_corpus(folder).passages, settings.encode.shard_passages
        shards = write_shards(stage.folder, passages, encoder, rows, share, name)
        if shards is not None:
            stage.finish(passages=len(shards), dim=shards.dim, dtype=dtype)
    return stage.final


def evaluate(settings: Settings) -> Path:
    """Compare all systems on the test queries: RUN/evaluate."""
    folder = corpus(settings)
    encoded = {system: encode(settings, system) for system in settings.evaluate.systems if system != "bm25"}
    models = {result_name(system): fingerprint(path) for system, path in encoded.items()}
    inputs = {"corpus": fingerprint(folder), **models}
    sections = {"evaluate": as_dict(settings.evaluate), "encoder": as_dict(settings.encoder)}
    stage = open_stage(settings.run, "evaluate", sections, inputs)
    if not stage.done:
        texts = open_corpus(folder)
        if ranks.rank() == 0:
            rows = [
                row
                for system in settings.evaluate.systems
                for row in _score(settings, system, texts, encoded, stage.folder)
            ]
            write_text(stage.folder / "results.json", json.dumps(rows, indent=2) + "\n")
        stage.finish(queries=len(texts.queries))
    return stage.final


def export(settings: Settings) -> Path:
    """Write a folder that sentence-transformers loads: RUN/export."""
    trained = train(settings)
    inputs = {"train": fingerprint(trained)}
    results = Path(settings.run) / "evaluate" / "results.json"
    if results.exists():
        inputs["evaluate"] = fingerprint(results.parent)
    stage = open_stage(settings.run, "export", {"export": as_dict(settings.export)}, inputs)
    if not stage.done:
        if ranks.rank() == 0:
            export_encoder(settings, trained, stage.folder)
        stage.finish()
    return stage.final


def report(settings: Settings) -> Path:
    """Write report.html and report.json into the run's folder, and the table to the terminal."""
    path = Path(settings.run) / "report.html"
    if ranks.rank() == 0:
        write_report(Path(settings.run), settings)
        rows = json.loads((Path(settings.run) / "report.json").read_text("utf-8"))["results"]
        print(results_table(rows), flush=True)
        say(f"report: {path}")
    ranks.barrier()
    return path


def run(settings: Settings) -> Path:
    """All stages, in order; each skips what is done."""
    for system in TRAINED:
        if system in settings.evaluate.systems:
            train(settings, system)
    evaluate(settings)
    if "drama" in settings.evaluate.systems:
        export(settings)
    return report(settings)


def result_name(system: str) -> str:
    """What a system is called in folders and tables: model:NAME by the last part of its name."""
    return Path(system.removeprefix(OTHER_MODEL)).name


def _need(settings: Settings, stage: str, command: str) -> None:
    """Tasks of an array must not make what all of them read: several would make it at once."""
    folder = Path(settings.run) / stage
    if not (folder / "provenance.json").exists():
        raise FileNotFoundError(f"{folder}: not there, and every share reads it; run first: {command}")


def _encoding(settings: Settings, system: str) -> tuple[dict[str, object], dict[str, str]]:
    """What a system's vectors depend on: settings, and inputs beside the corpus."""
    if system == "teacher":
        return {"teacher": as_dict(settings.teacher)}, {"model": model_fingerprint(settings.teacher.model)}
    sections: dict[str, object] = {"encode": as_dict(settings.encode)}
    if system.startswith(OTHER_MODEL):
        return sections, {"model": model_fingerprint(system.removeprefix(OTHER_MODEL))}
    sections["encoder"] = as_dict(settings.encoder)
    if system == "llm-unpruned":
        return sections, {"model": model_fingerprint(settings.llm)}
    return sections, {"model": fingerprint(train(settings, system))}


def _encoder(settings: Settings, system: str) -> TextEncoder:
    if system == "teacher":
        return Teacher(settings.teacher, settings.trust_remote_code)
    dtype = dtype_name(settings.encode.dtype)
    if system.startswith(OTHER_MODEL):
        encoder = load(system.removeprefix(OTHER_MODEL), dtype=dtype)
    elif system == "llm-unpruned":
        encoder = load(settings.llm, dtype=dtype, contract=settings.encoder, bidirectional=False)
    else:
        encoder = load(Path(settings.run) / TRAINED[system], dtype=dtype, contract=settings.encoder)
    if settings.encode.max_passage_tokens:
        encoder.contract = replace(encoder.contract, max_passage_tokens=settings.encode.max_passage_tokens)
    encoder.tokens_per_batch = settings.encode.batch_tokens
    return encoder


def _score(
    settings: Settings, system: str, texts: Corpus, encoded: dict[str, Path], folder: Path
) -> list[dict[str, object]]:
    """Result rows of one system, one for each dim."""
    name, depth = result_name(system), settings.evaluate.depth
    if system == "bm25":
        language = Counter(query.language for query in texts.queries).most_common(1)[0][0]
        index = build_lexical_index(texts.passages.texts(), language, folder / CHECKPOINTS / "bm25")
        return [row.as_row() for row in score_system(name, [], None, index, texts, depth, folder)]
    passages = EmbeddingShards(encoded[system])
    queries = _encoder(settings, system).encode_queries([query.text for query in texts.queries])
    dims = settings.encoder.dims if system in TRAINED else [passages.dim]
    return [row.as_row() for row in score_system(name, dims, queries, passages, texts, depth, folder)]
