"""Cost by length of text: time and memory for each token, of a training step and of encoding.

python benchmarks/lengths.py --data DIR [--model runs/quickstart/export] [--lengths 512 1024 2048 8192] [--dtype auto]

Every line has the same number of tokens, in texts of one length cut from TIME's articles end to end, so that only
the length differs. In the step each text is the query and its successor the passage; layers are checkpointed
and chunks hold one text of the largest length, as in configs/long-8k.yaml. memory/token: extra peak over the
tokens that are in memory at once, a chunk's.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Measured, arguments, as_row, circumstances, in_turns, use, write_results
from texts import corpus

from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.packing import pack
from drama_dist.settings import TrainSettings
from drama_dist.train.step import TrainingStep
from drama_dist.train.term import Relevance


def training_step(model: Path, dtype: str, chunk_tokens: int, checkpointed: bool) -> TrainingStep:
    """Of an exported encoder; every chunk is encoded twice."""
    settings = TrainSettings(
        dtype=dtype,
        temperature=0.05,
        chunk_tokens=chunk_tokens,
        activation_budget=0,
        checkpoint_layers=checkpointed,
    )
    return TrainingStep(load(model), settings)


def on_pairs(step: TrainingStep, texts: list[list[int]]) -> None:
    """One step with a learning rate of 0: the first half are queries, the others their passages; token ids."""
    count = len(texts) // 2
    relevance = Relevance(torch.arange(count), torch.arange(count))
    step.of_tokens(texts[:count], texts[count:], relevance, learning_rate=0.0)


@torch.no_grad()
def encode(encoder: Encoder, texts: list[list[int]], chunk_tokens: int) -> None:
    """Vectors of all texts."""
    size = chunk_tokens // len(texts[0])
    for begin in range(0, len(texts), size):
        encoder(pack(texts[begin : begin + size], encoder.device))


def cut(stream: list[int], encoder: Encoder, length: int, tokens: int) -> list[list[int]]:
    """As many texts of `length` tokens, BOS and EOS among them, as make up `tokens`."""
    bos, eos, inner = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id, length - 2
    return [[bos, *stream[index * inner : (index + 1) * inner], eos] for index in range(tokens // length)]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both jobs at every length, in turns."""
    chunk = max(options.lengths)
    step = training_step(options.model, options.dtype, chunk, checkpointed=True)
    plain = load(options.model, dtype=options.dtype)
    stream = [
        token
        for text in corpus(options.data, "time")
        for token in plain.tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    texts = {length: cut(stream, plain, length, options.chunks * chunk) for length in options.lengths}
    sides = {("step", length): partial(on_pairs, step, cuts) for length, cuts in texts.items()}
    sides |= {("encode", length): partial(encode, plain, cuts, chunk) for length, cuts in texts.items()}
    measured = in_turns(
        {f"{job} {length}": call for (job, length), call in sides.items()}, options.rounds, options.device
    )
    return [
        {
            "job": job,
            "length": length,
            "tokens": options.chunks * chunk,
            "chunk_tokens": chunk,
            "measured": as_row(measured[f"{job} {length}"]),
        }
        for job, length in sides
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what a token costs, and that over the cost at 1,024."""
    lines = [
        "Median; fastest to slowest round. Ratios are to the line of the same job at 1,024 tokens.",
        "",
        "| job | length | tokens | µs/token | ratio | MB | kB/token in memory | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    base = {row["job"]: Measured(**row["measured"]) for row in rows if row["length"] == 1024}
    for row in rows:
        measured = Measured(**row["measured"])
        micros = [1e6 * seconds / row["tokens"] for seconds in (measured.seconds, measured.fastest, measured.slowest)]
        ratios = ["", ""]
        if row["job"] in base:
            ratios = [
                f"{measured.seconds / base[row['job']].seconds:.2f}",
                f"{measured.megabytes / base[row['job']].megabytes:.2f}",
            ]
        lines.append(
            f"| {row['job']} | {row['length']} | {row['tokens']} | {micros[0]:.0f} ({micros[1]:.0f}–{micros[2]:.0f}) "
            f"| {ratios[0]} | {measured.megabytes:.0f} | {1e3 * measured.megabytes / row['chunk_tokens']:.1f} "
            f"| {ratios[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, data="time/", model=True, dtype=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 8192])
    parser.add_argument("--chunks", type=int, default=2, help="tokens of a line, in texts of the largest length")
    options = parser.parse_args()
    use(options)
    if options.chunks < 2:
        parser.error(f"--chunks {options.chunks}: expected 2 or more, so that the longest texts have a passage each")
    rows = measure(options)
    print(
        table(rows),
        write_results(f"lengths-{options.device}-{options.dtype}", circumstances(options.device), rows, table(rows)),
        sep="\n",
    )


if __name__ == "__main__":
    main()
