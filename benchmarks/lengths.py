"""Cost by length of text, ours and sentence-transformers': time and memory for each token, in a step and in encoding.

python benchmarks/lengths.py --data DIR [--model runs/quickstart/export] [--lengths 512 1024 2048 8192] [--dtype auto]

Every line has the same number of tokens, in texts of one length cut from TIME's articles end to end, so that only
the length differs. In the step each text is the query and its successor the passage; layers are checkpointed
and chunks hold one text of the largest length, as in configs/long-8k.yaml. The peer is sentence-transformers with the
same checkpoint, tokens, precision and chunks, its layers checkpointed too: at short lengths not its fastest setting,
which step.py and encode.py look for. kB/token: extra peak over the tokens that are in memory at once, a chunk's; with
the other side in the same process, so that sides are not compared in it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Measured, arguments, as_row, circumstances, in_turns, use, write_results
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from texts import corpus

from drama_dist.distributed import ranks
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.packing import pack
from drama_dist.setting_types import Dtype
from drama_dist.settings import TrainSettings
from drama_dist.train.step import TrainingStep
from drama_dist.train.term import Relevance

TEMPERATURE = 0.05
CLIPPING = 1.0
AGREEMENT = {  # of loss and gradient's norm, relative; of a text's vectors, 1 less their cosine
    "step": {"float32": 1e-3, "bfloat16": 0.1},
    "encode": {"float32": 1e-5, "bfloat16": 1e-3},
}

Tokens = list[list[int]]  # texts of one length


def our_step(model: Path, dtype: Dtype, chunk_tokens: int) -> Callable[[Tokens], torch.Tensor]:
    """Of an exported encoder, with a learning rate of 0; gives the loss and the gradient's norm.

    The first half of the texts are queries, the others their passages. Every chunk is encoded twice.
    """
    settings = TrainSettings(
        dtype=dtype,
        temperature=TEMPERATURE,
        gradient_clipping=CLIPPING,
        chunk_tokens=chunk_tokens,
        activation_budget=0,
        checkpoint_layers=True,
    )
    step = TrainingStep(load(model), settings)

    def call(texts: Tokens) -> torch.Tensor:
        count = len(texts) // 2
        relevance = Relevance(torch.arange(count), torch.arange(count))
        result = step.of_tokens(texts[:count], texts[count:], relevance, learning_rate=0.0)
        return torch.tensor([result.objective.loss, result.gradient_norm])

    return call


def peer_step(model: Path, dtype: str, chunk_tokens: int, dims: list[int]) -> Callable[[Tokens], torch.Tensor]:
    """The same of sentence-transformers."""
    encoder = SentenceTransformer(str(model), device=str(ranks.device()), trust_remote_code=False)
    encoder[0].auto_model.activation_checkpointing_enable()
    encoder.train()
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=0.0, weight_decay=0.01, fused=True)

    def call(texts: Tokens) -> torch.Tensor:
        size, count = chunk_tokens // len(texts[0]), len(texts) // 2
        cached = CachedMultipleNegativesRankingLoss(encoder, scale=1 / TEMPERATURE, mini_batch_size=size)
        loss = MatryoshkaLoss(encoder, cached, dims, [1 / len(dims)] * len(dims))
        narrow = (
            torch.autocast(encoder.device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
        )
        optimiser.zero_grad()
        with narrow:
            value = loss([features(encoder, texts[:count]), features(encoder, texts[count:])], torch.empty(0))
            value.backward()
        norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), CLIPPING)
        optimiser.step()
        return torch.stack([value.detach(), norm]).float().cpu()

    return call


@torch.no_grad()
def encode(encoder: Encoder, chunk_tokens: int, texts: Tokens) -> torch.Tensor:
    """Vectors of all texts."""
    size = chunk_tokens // len(texts[0])
    chunks = (texts[begin : begin + size] for begin in range(0, len(texts), size))
    found = torch.cat([encoder(pack(chunk, encoder.device)) for chunk in chunks])
    return torch.nn.functional.normalize(found.float()).cpu()


@torch.no_grad()
def peer_encode(encoder: SentenceTransformer, chunk_tokens: int, texts: Tokens) -> torch.Tensor:
    """The same of sentence-transformers."""
    size = chunk_tokens // len(texts[0])
    chunks = (texts[begin : begin + size] for begin in range(0, len(texts), size))
    found = torch.cat([encoder(features(encoder, chunk))["sentence_embedding"] for chunk in chunks])
    return torch.nn.functional.normalize(found.float()).cpu()


def features(encoder: SentenceTransformer, texts: Tokens) -> dict[str, torch.Tensor]:
    """As its tokenizer would give them."""
    ids = torch.tensor(texts, device=encoder.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cut(stream: list[int], encoder: Encoder, length: int, tokens: int) -> list[list[int]]:
    """As many texts of `length` tokens, BOS and EOS among them, as make up `tokens`."""
    bos, eos, inner = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id, length - 2
    return [[bos, *stream[index * inner : (index + 1) * inner], eos] for index in range(tokens // length)]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both jobs of both sides at every length, in turns."""
    chunk, model, dtype = max(options.lengths), options.model, options.dtype
    plain = load(model, dtype=dtype)
    peer = SentenceTransformer(
        str(model),
        model_kwargs={"dtype": getattr(torch, dtype)},
        device=str(ranks.device()),
        trust_remote_code=False,
    )
    stream = [
        token
        for text in corpus(options.data, "time")
        for token in plain.tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    texts = {length: cut(stream, plain, length, options.chunks * chunk) for length in options.lengths}
    sides: dict[tuple[str, str], Callable[[Tokens], Any]] = {
        ("step", "ours"): our_step(model, dtype, chunk),
        ("step", "peer"): peer_step(model, dtype, chunk, plain.contract.dims),
        ("encode", "ours"): partial(encode, plain, chunk),
        ("encode", "peer"): partial(peer_encode, peer, chunk),
    }
    calls = {
        f"{job} {side} {length}": partial(sides[job, side], texts[length])
        for job in AGREEMENT
        for length in options.lengths
        for side in ("ours", "peer")
    }
    found = {name: call() for name, call in calls.items()}  # the round that does not count
    measured = in_turns(calls, options.rounds, options.device, warm_up=0)
    rows = []
    for job in AGREEMENT:
        for length in options.lengths:
            ours, theirs = (found[f"{job} {side} {length}"] for side in ("ours", "peer"))
            gaps = (ours - theirs).abs() / theirs.abs() if job == "step" else 1 - (ours * theirs).sum(1)
            difference = float(gaps.max())
            rows += [
                {
                    "job": job,
                    "side": side,
                    "length": length,
                    "tokens": options.chunks * chunk,
                    "chunk_tokens": chunk,
                    "measured": as_row(measured[f"{job} {side} {length}"]),
                    "difference": difference,
                    "agree": difference <= AGREEMENT[job][dtype],
                }
                for side in ("ours", "peer")
            ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what a token costs, that over the cost at 1,024, and what the peer takes over ours."""
    lines = [
        "Median; fastest to slowest round. Ratios are to the line of the same job and side at 1,024 tokens; times: the",
        "peer's time over ours. Difference: of loss and gradient's norm, relative; of vectors, 1 less the cosine.",
        "",
        "| job | side | length | tokens | µs/token | ratio | times | MB | kB/token | ratio | difference |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    of = {(row["job"], row["side"], row["length"]): Measured(**row["measured"]) for row in rows}
    for row in rows:
        job, side, length = row["job"], row["side"], row["length"]
        measured, peer = of[job, side, length], of[job, "peer", length]
        micros = [1e6 * seconds / row["tokens"] for seconds in (measured.seconds, measured.fastest, measured.slowest)]
        ratios, times = ["", ""], ""
        if (base := of.get((job, side, 1024))) is not None:
            ratios = [f"{measured.seconds / base.seconds:.2f}", f"{measured.megabytes / base.megabytes:.2f}"]
        if side == "ours":
            times = f"{peer.seconds / measured.seconds:.2f}" if row["agree"] else "no agreement"
        lines.append(
            f"| {job} | {side} | {length} | {row['tokens']} | {micros[0]:.0f} ({micros[1]:.0f}–{micros[2]:.0f}) "
            f"| {ratios[0]} | {times} | {measured.megabytes:.0f} "
            f"| {1e3 * measured.megabytes / row['chunk_tokens']:.1f} | {ratios[1]} | {row['difference']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, data="time/", model=True, dtype=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 8192])
    parser.add_argument("--chunks", type=int, default=4, help="tokens of a line, in texts of the largest length")
    options = parser.parse_args()
    use(options)
    if options.chunks < 4:
        parser.error(
            f"--chunks {options.chunks}: expected 4 or more; with fewer the longest texts are one pair, of loss 0"
        )
    rows = measure(options)
    print(
        table(rows),
        write_results(f"lengths-{options.device}-{options.dtype}", circumstances(options.device), rows, table(rows)),
        sep="\n",
    )


if __name__ == "__main__":
    main()
