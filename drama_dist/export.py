"""Export: a model folder that any sentence-transformers user loads, without remote code.

Covers the folder (weights, tokenizer, pooling, query prompt, Matryoshka dims), the model card, and
a check that sentence-transformers gives our vectors. ONNX is not covered.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.contract import write_contract
from drama_dist.settings import Settings
from drama_dist.stages import write_text

_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
_PROBES = ["how do I invert a matrix", "A passage. It has two sentences.", "x", "word " * 600]


def export_encoder(settings: Settings, trained: Path, folder: Path) -> None:
    """Write the trained encoder to `folder`.

    Raises RuntimeError where sentence-transformers, loading the folder, gives other vectors.
    """
    encoder = load(trained, dtype=settings.export.dtype, device="cpu")
    write_sentence_transformers(encoder, folder)
    write_text(folder / "README.md", model_card(settings, encoder))
    _check_parity(load(folder, dtype=settings.export.dtype, device="cpu"), folder, settings.export.dtype)


def write_sentence_transformers(encoder: Encoder, folder: Path) -> None:
    """Write backbone, mean pooling, normalisation and prompts in sentence-transformers' own layout."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    encoder.save(folder)
    contract = encoder.contract
    transformer = Transformer(str(folder), max_seq_length=max(contract.max_query_tokens, contract.max_passage_tokens))
    model = SentenceTransformer(
        modules=[transformer, Pooling(encoder.hidden_size, pooling_mode="mean"), Normalize()],
        prompts={"query": contract.query_prefix, "document": contract.passage_prefix},
        similarity_fn_name="cosine",
        device="cpu",
    )
    model.save(str(folder), create_model_card=False, safe_serialization=True)
    write_contract(folder, contract)


def model_card(settings: Settings, encoder: Encoder) -> str:
    """The model card: what it is, how to use it, data, settings, results."""
    config = encoder.backbone.config
    weights = sum(weight.numel() for weight in encoder.parameters())
    embeddings = config.vocab_size * config.hidden_size
    dims = ", ".join(str(dim) for dim in sorted(encoder.contract.dims, reverse=True))
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, dense-retrieval, matryoshka]
language: {settings.corpus.language}
---
# Dense retriever pruned from {settings.llm}

A bidirectional Llama encoder: {config.num_hidden_layers} layers × {config.hidden_size}, {config.num_attention_heads} heads,
MLP {config.intermediate_size}; {(weights - embeddings) / 1e6:.1f} million weights without the {embeddings / 1e6:.1f} million of the embeddings.
Mean pooling, cosine similarity; vectors may be cut to {dims} components.

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("FOLDER")  # truncate_dim={min(encoder.contract.dims)} for the shortest vectors
queries = model.encode_query(["how do I invert a matrix"])
passages = model.encode_document(["Compute the inverse of a square matrix."])
```

Queries get the prefix `{encoder.contract.query_prefix}` (set as the query prompt). Lengths in training:
{encoder.contract.max_query_tokens} tokens for queries, {encoder.contract.max_passage_tokens} for passages.

## Training data
{_data(settings)}

## Settings
```json
{json.dumps({"prune": vars(settings.prune), "augment": vars(settings.augment), "train": vars(settings.train), "seed": settings.seed}, indent=1)}
```

## Results
{_results(Path(settings.run))}
"""


def _data(settings: Settings) -> str:
    source = settings.corpus.path + (" " + ", ".join(settings.corpus.packages) if settings.corpus.packages else "")
    lines = [f"Corpus: `{source}`; examples written with `{settings.llm}`, ranked by `{settings.teacher.model}`."]
    counts = Path(settings.run) / "augment" / "counts.json"
    if counts.exists():
        lines.append(f"Counts: `{json.dumps(json.loads(counts.read_text('utf-8')))}`")
    return "\n".join(lines)


def _results(run: Path) -> str:
    path = run / "evaluate" / "results.json"
    if not path.exists():
        return "Not evaluated."
    rows = json.loads(path.read_text("utf-8"))
    columns = ["system", "dim", "ndcg@10", "recall@100", "mrr@10"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [f"{row[name]:.4f}" if "@" in name else str(row[name] or "") for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _check_parity(encoder: Encoder, folder: Path, dtype: str) -> None:
    """Compare with the folder as sentence-transformers loads it."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False, model_kwargs={"dtype": getattr(torch, dtype)})
    limit = theirs.max_seq_length
    pairs = []
    for own, encode, length in (
        (encoder.encode_queries, theirs.encode_query, encoder.contract.max_query_tokens),
        (encoder.encode_passages, theirs.encode_document, encoder.contract.max_passage_tokens),
    ):
        theirs.max_seq_length = length
        pairs.append(np.abs(own(_PROBES) - np.asarray(encode(_PROBES), dtype=np.float32)).max())
    theirs.max_seq_length = limit
    if max(pairs) > _TOLERANCE[dtype]:
        raise RuntimeError(f"{folder}: sentence-transformers' vectors differ from ours by {max(pairs):.2e}")
