"""Export: a model folder that any sentence-transformers user loads, without remote code.

Covers the folder (weights, tokenizer, pooling, query prompt, Matryoshka dims), the model card, and
a check that sentence-transformers gives our vectors. ONNX is not covered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import yaml

from drama_dist.distributed import ranks
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.contract import as_encoded, write_contract
from drama_dist.encoder.head import HEAD_FOLDER
from drama_dist.evaluate.report import results_table
from drama_dist.labels import without_url
from drama_dist.run.artefact import verify
from drama_dist.run.files import write_text
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import CORPUS, is_finished
from drama_dist.run.runner import Run
from drama_dist.setting_types import without_urls
from drama_dist.settings import Settings, as_dict

_CARD = Path(__file__).with_name("model_card.md")
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
_PROBES = ["how do I invert a matrix", "A passage. It has two sentences.", "CAPITALS, É AND ß", "x", "word " * 600]


def export(run: Run, folder: StageFolder) -> None:
    """Do the stage: RUN/export."""
    if ranks.rank() == 0:
        export_encoder(run.settings, run.path("train"), folder.folder)
    folder.finish()


def export_encoder(settings: Settings, trained: Path, folder: Path) -> None:
    """Write the trained encoder to `folder`; it reads as much of a passage as the run's encoding does.

    Raises RuntimeError where sentence-transformers, loading the folder, gives other vectors.
    """
    encoder = load(trained, dtype=settings.export.dtype, device="cpu")
    encoder.contract = as_encoded(encoder.contract, settings.encode, encoder.backbone.config.max_position_embeddings)
    write_sentence_transformers(encoder, folder)
    write_text(folder / "README.md", model_card(settings, encoder))
    _check_parity(load(folder, dtype=settings.export.dtype, device="cpu"), folder, settings.export.dtype)


def write_sentence_transformers(encoder: Encoder, folder: Path) -> None:
    """Write backbone, mean pooling, linear head, normalisation and prompts in sentence-transformers' own layout."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    encoder.save(folder)
    head = [] if encoder.head is None else [Dense.load(str(folder), subfolder=HEAD_FOLDER)]
    contract = encoder.contract
    untrusted = {"trust_remote_code": False}
    transformer = Transformer(
        str(folder),
        max_seq_length=max(contract.max_query_tokens, contract.max_passage_tokens),
        query_length=contract.max_query_tokens,
        document_length=contract.max_passage_tokens,
        model_kwargs={**untrusted, "use_safetensors": True},
        processor_kwargs={**untrusted},
        config_kwargs={**untrusted},
    )
    model = SentenceTransformer(
        modules=[transformer, Pooling(encoder.hidden_size, pooling_mode="mean"), *head, Normalize()],
        prompts={"query": contract.query_prefix, "document": contract.passage_prefix},
        similarity_fn_name="cosine",
        device="cpu",
        trust_remote_code=False,
    )
    model.save(str(folder), create_model_card=False, safe_serialization=True)
    write_contract(folder, contract)


def model_card(settings: Settings, encoder: Encoder) -> str:
    """The model card: what it is, how to use it, data, settings, results."""
    config, run = encoder.backbone.config, Path(settings.run)
    weights = sum(weight.numel() for weight in encoder.backbone.parameters())
    embeddings = config.vocab_size * config.hidden_size
    if is_finished(run, f"evaluate/{CORPUS}"):
        verify(run, f"evaluate/{CORPUS}")
    rows = _json(run / "evaluate" / CORPUS / "results.json")
    sections = ("prune", "teacher", "augment", "targets", "train")
    told = without_urls({name: as_dict(getattr(settings, name)) for name in sections})
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["without_url"] = without_url
    return environment.from_string(_CARD.read_text("utf-8")).render(
        settings=settings,
        config=config,
        contract=encoder.contract,
        size=encoder.size,
        dims=sorted(encoder.contract.dims, reverse=True),
        backbone_weights=weights - embeddings,
        embedding_weights=embeddings,
        head_weights=0 if encoder.head is None else sum(weight.numel() for weight in encoder.head.parameters()),
        counts=_json(run / "augment" / "counts.json") or {},
        settings_yaml=yaml.safe_dump({"seed": settings.seed, **told}, sort_keys=False),
        results=results_table(rows, markdown=True) if rows else None,
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _check_parity(encoder: Encoder, folder: Path, dtype: str) -> None:
    """Compare with the folder as sentence-transformers loads it."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(
        str(folder),
        device="cpu",
        trust_remote_code=False,
        model_kwargs={"dtype": getattr(torch, dtype), "use_safetensors": True},
    )
    pairs = (encoder.encode_queries, theirs.encode_query), (encoder.encode_passages, theirs.encode_document)
    most = max(np.abs(ours(_PROBES) - np.asarray(their(_PROBES), dtype=np.float32)).max() for ours, their in pairs)
    if most > _TOLERANCE[dtype]:
        raise RuntimeError(f"{folder}: sentence-transformers' vectors differ from ours by {most:.2e}")
