"""The `drama` command: a thin subcommand for each stage, and submit, search, compare, plan and doctor.

Covers arguments and turning errors into messages. The stages are listed in run/graph.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from drama_dist.run import interrupts
from drama_dist.run.graph import CORPUS, STAGES, is_finished
from drama_dist.run.shares import WHOLE, Share
from drama_dist.run.submit import submit, submitted_verbs
from drama_dist.setting_types import Precision
from drama_dist.settings import Settings, read_settings

VERBS = {
    "run": "all stages in order, skipping finished ones",
    **{stage.verb: stage.help for stage in STAGES if stage.name.split("/")[0] == stage.verb},
}
PRECISIONS = get_args(Precision)
USER_ERRORS = (ValueError, OSError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status (2 for an error in settings or data)."""
    options = _read(arguments)
    interrupts.listen()
    try:
        if options.verb == "search":
            _search(options)
        elif options.verb == "compare":
            _compare(options)
        elif options.verb == "submit":
            _submit(options)
        elif options.verb == "doctor":
            _doctor(options)
        elif options.verb == "plan":
            _plan(options)
        else:
            _make(read_settings(options.settings, options.overrides), options)
    except USER_ERRORS as error:
        if os.environ.get("DRAMA_TRACEBACK"):
            raise
        print(f"drama {options.verb}: {error}", file=sys.stderr)
        return 2
    except interrupts.Stopped as stopped:
        print(f"\ndrama {options.verb}: {stopped}: stopped; run the same command to resume", file=sys.stderr)
        return interrupts.STOPPED
    except KeyboardInterrupt:
        print(f"\ndrama {options.verb}: interrupted; run the same command to resume", file=sys.stderr)
        return 130
    return 0


def launch(*verb: str) -> NoReturn:
    """Entry point of `drama`; with a verb, of launcher/VERB.py (under deepspeed, torchrun, srun, mpirun or python)."""
    try:
        status = main([*verb, *sys.argv[1:]])
    except Exception:
        traceback.print_exc()
        status = 1
    if "drama_dist.distributed.ranks" in sys.modules:  # importing PyTorch takes seconds
        from drama_dist.distributed import ranks

        ranks.end(status)
    sys.exit(status)


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line. argparse takes the overrides before an option only; those after it are added here."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    late = [word for word in rest if hasattr(options, "overrides") and "=" in word and not word.startswith("-")]
    if late:
        options.overrides = [*options.overrides, *late]
    # DeepSpeed's launcher adds --local_rank
    unknown = [word for word in rest if word not in late and not word.startswith("--local_rank")]
    if unknown:
        parser.error(f"unknown {'option' if unknown[0].startswith('-') else 'argument'} {unknown[0]}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drama", description="Turn a large language model and unlabelled text into a small, fast dense retriever."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        stage = _stage_parser(verbs, verb, summary)
        stage.add_argument(
            "--discard-partial",
            action="store_true",
            help="delete what was begun with other settings or inputs and not finished, and begin it anew",
        )
        if verb in ("encode", "augment"):
            stage.add_argument(
                "--share",
                metavar="INDEX/COUNT",
                help="do only this share, for example 0/8, as a task of an array job; a run without it then finishes",
            )
        if verb == "augment":
            stage.add_argument(
                "--preview", metavar="N", type=_count, help="only show some N training queries, of every source"
            )
        if verb in ("encode", "train"):
            stage.add_argument("--system", metavar="NAME", default="drama", help="which system (default drama)")
        if verb in ("encode", "corpus"):
            stage.add_argument(
                "--collection",
                metavar="NAME",
                default=CORPUS,
                help="of evaluate.collections or the suite, or windows: the texts to train on (default: the corpus)",
            )
    submit = _stage_parser(verbs, "submit", "submit slurm jobs for all stages, or for one")
    submit.add_argument(
        "--stage", choices=submitted_verbs(), default="run", help="what to submit (default run: everything)"
    )
    submit.add_argument("--dry-run", action="store_true", help="print the batch scripts without submitting them")
    search = verbs.add_parser("search", help="search a finished run", description="Search a finished run's corpus.")
    search.add_argument("run", type=Path, help="the run's folder, for example runs/quickstart")
    search.add_argument("query", type=_unicode, help="what to search for")
    search.add_argument("-k", type=_count, default=5, help="how many passages to show (default 5)")
    search.add_argument(
        "--hybrid",
        nargs="?",
        type=_fraction,
        const=0.5,
        metavar="WEIGHT",
        help="mix the scores with BM25's; WEIGHT, 0 to 1, is the share of the vectors (default 0.5)",
    )
    search.add_argument(
        "--system",
        choices=["drama", "asymmetric"],
        default="drama",
        help="whose vectors of the passages are searched; asymmetric: the teacher's and BM25's (default drama)",
    )
    search.add_argument("--dim", type=_count, help="cut vectors to this many components (default: all)")
    compare = verbs.add_parser(
        "compare",
        help="compare two finished runs: a paired test, and which queries one wins and loses",
        description="Compare two finished runs, A and B: a paired test, and the queries that A wins and loses.",
    )
    compare.add_argument("run_a", metavar="RUN_A", type=Path, help="a run's folder")
    compare.add_argument("run_b", metavar="RUN_B", type=Path, help="the other's, or the same: see --with-system")
    compare.add_argument("--collection", metavar="NAME", help="only this one (default: all that both have results on)")
    compare.add_argument("--system", metavar="NAME", default="drama", help="which system (default drama)")
    compare.add_argument("--with-system", metavar="NAME", help="B's system, where it is another one")
    compare.add_argument("--dim", type=_count, help="the number of components (default: the largest that both have)")
    compare.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of vectors: one of evaluate.precisions (default float32)",
    )
    compare.add_argument("--with-precision", choices=PRECISIONS, help="that of B's vectors, where it is another one")
    compare.add_argument(
        "--queries", metavar="N", type=_count, default=5, help="how many wins and losses to show (default 5)"
    )
    compare.add_argument(
        "--output", metavar="FILE", type=_table_file, help="write all queries with both values to a .tsv or .json file"
    )
    plan = _stage_parser(verbs, "plan", "estimate memory, traffic and time of training steps before running them")
    plan.add_argument("--ranks", type=_count, default=1, help="number of training processes (default 1)")
    plan.add_argument("--device", default="cpu", help="cpu (this machine), h100-80g, h200, a100-80g or a100-40g")
    plan.add_argument(
        "--vocabulary", type=_count, help="how many tokens the LLM's vocabulary has, if its configuration is not here"
    )
    plan.add_argument("--head", type=_count, help="the LLM's head size, to go with --vocabulary")
    doctor = verbs.add_parser(
        "doctor", help="check what this machine offers", description="Check what this machine offers."
    )
    doctor.add_argument("--json", action="store_true", help="print a JSON list")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text[:20]!r}: must be a whole number, 1 or more")
    return int(text)


def _fraction(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text[:20]!r}: must be a number from 0 to 1")
    return share


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that the terminal's encoding has no characters for
        raise argparse.ArgumentTypeError(f"{text!r}: is not UTF-8 text") from None
    return text


def _table_file(text: str) -> Path:
    if Path(text).suffix not in (".tsv", ".json"):
        raise argparse.ArgumentTypeError(f"{text!r}: must end in .tsv or .json")
    return Path(text)


def _stage_parser(verbs: Any, verb: str, summary: str) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}."
    parser: argparse.ArgumentParser = verbs.add_parser(verb, help=summary, description=description)
    parser.add_argument("settings", type=Path, help="a YAML file, for example configs/quickstart.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings to override, for example run=runs/mine train.steps=50",
    )
    return parser


def _submit(options: argparse.Namespace) -> None:
    settings = read_settings(options.settings, options.overrides)
    submit(settings, options.stage, [str(options.settings), *options.overrides], options.dry_run)


def _make(settings: Settings, options: argparse.Namespace) -> None:
    """Make the artefacts of a stage's verb, as one rank or several."""
    share = Share.read(options.share) if getattr(options, "share", None) else WHOLE
    parameters = {name: getattr(options, name) for name in ("collection", "system") if hasattr(options, name)}
    from drama_dist.distributed import ranks
    from drama_dist.run.runner import make

    _quiet_libraries()
    if getattr(options, "preview", None):
        from drama_dist.augment.preview import preview

        if ranks.world_size() > 1 or not share.whole or options.discard_partial:
            raise ValueError("--preview: by itself, in one process, without --share and --discard-partial")
        print("\n".join(preview(settings, options.preview)))
        return
    if ranks.world_size() == 1:
        make(settings, options.verb, share, options.discard_partial, **parameters)
        return
    ranks.start()
    try:
        make(settings, options.verb, share, options.discard_partial, **parameters)
    finally:
        ranks.stop()


def _search(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from drama_dist.corpus.collection import open_collection
    from drama_dist.encoder.backbone import load
    from drama_dist.search.dense import search_folder
    from drama_dist.search.fusion import convex_mix
    from drama_dist.search.lexical import LexicalIndex
    from drama_dist.search.systems import MIX_DEPTH

    encoder = load(_finished(options.run, "train"), dtype="float32")
    encoded = _finished(options.run, f"encode/{CORPUS}/{options.system}", f"encode --system {options.system}")
    corpus = open_collection(_finished(options.run, "corpus"))
    query = encoder.encode_queries([options.query], options.dim)
    k = options.k if options.hybrid is None else max(options.k, MIX_DEPTH)
    scores, positions = search_folder(encoded, _index_over(encoded, options.run, options.system), query, k)
    if options.hybrid is not None:
        lexical = LexicalIndex(_finished(options.run, f"encode/{CORPUS}/bm25", "encode --system bm25"))
        rankings = [(scores, positions, None), (*lexical.search([options.query], k), 0.0)]
        scores, positions = convex_mix(rankings, [options.hybrid, 1 - options.hybrid], options.k)
    for rank, (score, position) in enumerate(zip(scores[0], positions[0], strict=True), 1):
        if position < 0:
            break  # the index finds no more
        passage = corpus.passages[int(position)]
        text = passage.content if len(passage.content) <= 200 else passage.content[:200].rsplit(" ", 1)[0] + " ..."
        print(f"{rank}. {passage.id}  ({score:.3f})\n   {text}")


def _index_over(encoded: Path, run: Path, system: str) -> Path | None:
    """The index over a system's vectors; None where the run has none."""
    from drama_dist.run.artefact import fingerprint_of_artefact, inputs_of

    name = f"{CORPUS}/{system}"
    if not is_finished(run, f"index/{name}"):
        return None
    index = _finished(run, f"index/{name}")
    if inputs_of(index)[f"encode/{name}"] != fingerprint_of_artefact(encoded):
        raise ValueError(f"{index}: over other vectors than {encoded} has; delete it, or build it again: drama encode")
    print(f"searching the index {index}; delete it to search exactly", file=sys.stderr)
    return index


def _compare(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from drama_dist.evaluate.compare import as_text, compare, write_queries

    systems = (options.system, options.with_system or options.system)
    precisions = (options.precision, options.with_precision or options.precision)
    comparisons = compare(options.run_a, options.run_b, options.collection, systems, options.dim, precisions)
    if options.output:
        write_queries(comparisons, options.output)
    print(as_text(comparisons, options.queries, shutil.get_terminal_size((120, 24)).columns))


def _doctor(options: argparse.Namespace) -> None:
    from drama_dist.plan.doctor import doctor

    doctor(options.json)


def _plan(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from drama_dist.plan.report import plan, pruned_shape

    settings = read_settings(options.settings, options.overrides)
    given = options.vocabulary is not None
    if given != (options.head is not None):
        raise ValueError("--vocabulary and --head go together: give both or neither")
    if given and settings.train.start:
        raise ValueError("--vocabulary and --head describe the LLM that is pruned, but train.start names an encoder")
    plan(
        settings,
        options.ranks,
        options.device,
        pruned_shape(settings, options.vocabulary, options.head) if given else None,
    )


def _finished(run: Path, stage: str, command: str = "run") -> Path:
    """The folder of a finished artefact, which a command makes; raises Damaged where it is not what was written."""
    from drama_dist.run.artefact import verify

    if not is_finished(run, stage):
        raise FileNotFoundError(f"{run / stage}: not found; make it first: drama {command} SETTINGS run={run}")
    verify(run, stage)
    return run / stage


def _quiet_libraries() -> None:
    """Silence the libraries' progress bars and messages, except errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import logging

    import datasets
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns that it looked for one
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


if __name__ == "__main__":
    launch()
