"""The train stage: RUN/train, and RUN/train-random-init, the same from random weights.

Covers what training starts from. The training itself is in loop.py and step.py.
"""

from __future__ import annotations

from drama_dist.corpus.collection import open_collection
from drama_dist.encoder.backbone import Encoder, load, random_twin
from drama_dist.encoder.contract import check_dims
from drama_dist.encoder.failures import named_by
from drama_dist.encoder.model_check import check_encoder
from drama_dist.encoder.sources import model_fingerprint
from drama_dist.records import Example, read_records
from drama_dist.run import interrupts
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import TRAINING_TEXTS
from drama_dist.run.runner import Run
from drama_dist.settings import Settings
from drama_dist.train.loop import train_encoder
from drama_dist.train.ridge import in_closed_form
from drama_dist.train.target_vectors import VectorTargets
from drama_dist.train.targets import open_targets


def inputs(run: Run, system: str) -> dict[str, str]:
    """The fingerprint of a model to start from that is not this run's own."""
    start = run.settings.train.start
    return {} if start is None else {"start": run.once(model_fingerprint, start)}


def check(settings: Settings, system: str) -> None:
    """Raise SettingsError if train.start cannot be trained, or has fewer components than encoder.dims asks for."""
    start = settings.train.start
    if start is not None:
        # A head that is fitted has as many components as encoder.dims asks for.
        fits_a_head = settings.train.regression_weight > 0 or system == "ridge"
        with named_by("train.start", start):
            contract = None if fits_a_head else settings.encoder
            size = check_encoder(start, contract, with_superwords=settings.train.superwords > 0)
        if not fits_a_head:
            check_dims(settings.encoder, size, f"train.start={start}")


@interrupts.deferred()
def train(run: Run, folder: StageFolder, system: str) -> None:
    """Do the stage; system: drama or random-init.

    Raises ValueError where there are too few examples for a batch, interrupts.Stopped after the step in which a signal
    asked for it, with a checkpoint saved.
    """
    settings = run.settings
    regression = settings.train.regression_weight > 0
    source = settings.train.start or run.path("prune")

    def begin(device: str | None = None) -> Encoder:
        if system == "drama":
            return load(run.path("ridge") if regression else source, contract=settings.encoder, device=device)
        if regression:
            # On every rank, in minutes; rounding may differ, since DeepSpeed broadcasts rank 0's.
            return in_closed_form(run, random_twin(load(source, device=device), settings.seed))[0]
        return random_twin(load(source, contract=settings.encoder, device=device), settings.seed)

    examples = read_records(run.path("augment") / "examples.jsonl", Example.from_json)
    scores = open_targets(run) if settings.train.soft_target_weight else None
    vectors = VectorTargets.open(run.path("targets")) if regression else None
    table = open_collection(run.path(TRAINING_TEXTS)).passages
    means_something = regression or system == "drama"  # random weights are no start to go back to
    again = begin if means_something else None
    facts = train_encoder(settings, folder, begin(), examples, table, scores, vectors, again)
    folder.finish(**facts)
