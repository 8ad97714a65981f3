"""The runner: makes a run's artefacts in dependency order, each once.

Covers opening each stage's folder with its settings and inputs, refusing other settings and damage before anything is
made, and shares of array jobs. The stages are listed in graph.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from drama_dist.distributed import ranks
from drama_dist.run.artefact import fingerprint_of_artefact
from drama_dist.run.folder import DISCARD, open_stage, refuse_what_is_there
from drama_dist.run.graph import Artefact, artefacts_of, command_of, function_named, is_finished, order_of
from drama_dist.run.shares import WHOLE, Share
from drama_dist.settings import Settings, write_settings


class Run:
    """A run with its settings: makes artefacts, each once, and remembers where they are.

    discard_partial: delete what was begun with other settings or inputs, and not finished (see `open_stage`).
    """

    def __init__(self, settings: Settings, discard_partial: bool = False):
        self.settings = settings
        self.discard_partial = discard_partial
        self.folder = Path(settings.run)
        self._made: dict[str, Path] = {}
        self._answers: dict[tuple[Callable[[str], str], str], str] = {}

    def make(self, *names: str, share: Share = WHOLE) -> Path:
        """Make artefacts and everything they need, except what is finished; return the folder of the last one.

        share: a task's share of the last artefact, whose inputs must be finished. Raises OtherSettings before anything
        is made if an artefact exists with other settings, or at its turn if it was made from other inputs; Damaged,
        before anything is made, if a finished one is not what was written;
        FileNotFoundError if a share is asked for and an input of the stage is missing, ValueError if it cannot be
        shared; whatever the stages' checks raise.
        """
        order = order_of(self.settings, *names)
        if not share.whole:
            self._check_share(order)
        ranks.by_rank_0(lambda: self._check_what_is_there(order))
        ranks.by_rank_0(lambda: self._check_what_is_to_come(order))
        for artefact in order:
            if artefact.name not in self._made:
                last = artefact is order[-1]
                self._made[artefact.name] = self._open_and_work(artefact, share if last else WHOLE)
        return self._made[names[-1]]

    def path(self, name: str) -> Path:
        """The folder of an artefact that the current stage needs; raises KeyError if the table does not list it."""
        return self._made[name]

    def once(self, function: Callable[[str], str], argument: str) -> str:
        """What a function returns for an argument, called once a run: for what reads large files."""
        key = function, argument
        if key not in self._answers:
            self._answers[key] = function(argument)
        return self._answers[key]

    def _open_and_work(self, artefact: Artefact, share: Share) -> Path:
        stage, parameters = artefact.stage, artefact.parameters
        if not stage.foldered:
            function_named(stage.work)(self, **parameters)
            return self.folder
        inputs = {needed: fingerprint_of_artefact(self._made[needed]) for needed in artefact.needs(self.settings)}
        if stage.inputs:
            inputs |= function_named(stage.inputs)(self, **parameters)
        sections = artefact.sections(self.settings)
        folder = open_stage(self.folder, artefact.name, sections, inputs, share, self.discard_partial)
        if not folder.done:
            if share.whole:
                self._record_settings()
            function_named(stage.work)(self, folder, **parameters)
        return folder.folder

    def _record_settings(self) -> None:
        """Write RUN/settings.yaml: of the last start that made something: others leave it as it is."""
        if ranks.rank() == 0:
            write_settings(self.settings, self.folder / "settings.yaml")

    def _check_what_is_there(self, order: Sequence[Artefact]) -> None:
        for artefact in order:
            if artefact.stage.foldered:
                sections = artefact.sections(self.settings)
                refuse_what_is_there(self.folder, artefact.name, sections, self.discard_partial)

    def _check_what_is_to_come(self, order: Sequence[Artefact]) -> None:
        for artefact in order:
            if artefact.stage.check and not is_finished(self.folder, artefact.name):
                function_named(artefact.stage.check)(self.settings, **artefact.parameters)

    def _check_share(self, order: Sequence[Artefact]) -> None:
        """Tasks of an array must not make what all of them read: several would do so at once."""
        *needed, shared = order
        if not shared.is_array(self.settings):
            raise ValueError(f"--share: {shared.name} is not work that tasks can share; run it without")
        for artefact in needed:
            if not is_finished(self.folder, artefact.name):
                raise FileNotFoundError(
                    f"{self.folder / artefact.name}: not found, and every share reads it; run first: "
                    f"drama {' '.join(command_of(artefact))} SETTINGS"
                )


def make(
    settings: Settings, command: str, share: Share = WHOLE, discard_partial: bool = False, **parameters: str
) -> Path:
    """Make the artefacts of a `drama` command, as `Run.make` does; of a share only the one that tasks share.

    discard_partial: as for `Run`. parameters: collection, system. Raises ValueError for discard_partial with a share.
    """
    if discard_partial and not share.whole:
        raise ValueError(f"{DISCARD} and --share: tasks delete nothing, since others may be at work; give one of them")
    names = artefacts_of(settings, command, **parameters)
    return Run(settings, discard_partial).make(*(names if share.whole else names[:1]), share=share)
