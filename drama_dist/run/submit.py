"""Slurm jobs: which a stage needs, filled from the settings, printed or submitted.

Which stages have jobs, and which are array jobs, says run/graph.py. Tasks of an array share only files; the job after
each finishes its stage. Jobs of a chain wait for one another. The batch script is launcher/slurm/job.sh; what a job
does when it is warned of its time limit is in interrupts.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from drama_dist.run.graph import STAGES, Artefact, artefacts_of, command_of, is_finished, order_of
from drama_dist.run.interrupts import STOPPED
from drama_dist.settings import Settings


@dataclass(frozen=True)
class Job:
    """One batch job: a command of `drama`, on `nodes` machines, or as an array of tasks of one each.

    alone: one process does it all.
    """

    name: str
    command: tuple[str, ...]
    nodes: int = 1
    array: bool = False
    alone: bool = False


class _Script(Template):
    delimiter = "%%"  # the shell's own $ stays as it is


def submitted_verbs() -> list[str]:
    """The commands that can be submitted: those of stages with jobs of their own, and run."""
    return ["run", *dict.fromkeys(stage.verb for stage in STAGES if stage.processes)]


def chain(settings: Settings, verb: str) -> list[Job]:
    """The jobs, in order, that make what a command makes, and what that needs and is not finished yet."""
    order = order_of(settings, *artefacts_of(settings, verb))
    missing = [artefact for artefact in order if not is_finished(settings.run, artefact.name)]
    jobs = [job for artefact in missing for job in _jobs(settings, artefact)]
    return [*jobs, Job("rest", ("run",))] if verb == "run" else jobs


def _jobs(settings: Settings, artefact: Artefact) -> list[Job]:
    name, command, processes = artefact.name.replace("/", "-"), tuple(command_of(artefact)), artefact.stage.processes
    nodes = settings.slurm.nodes if processes == "nodes" else 1
    if artefact.is_array(settings):
        return [Job(f"{name}-array", command, array=True), Job(name, command)]
    return [Job(name, command, nodes, alone=processes == "one")] if processes else []


def script(settings: Settings, job: Job, arguments: Sequence[str], title: str) -> str:
    """The batch script of a job. arguments: the settings file and overrides, as `drama` takes them."""
    choice = settings.slurm
    share = ("--share", f"$SLURM_ARRAY_TASK_ID/{choice.array}") if job.array else ()
    verb, *chosen = job.command
    words = [sys.executable, "-m", "drama_dist.cli", verb, *arguments, *chosen]
    threads = [f"export OMP_NUM_THREADS={choice.cpus_per_task}"] if choice.cpus_per_task else []
    return _Script(files("drama_dist.launcher").joinpath("slurm", "job.sh").read_text("utf-8")).substitute(
        title=title,
        options="\n".join(f"#SBATCH {option}" for option in _options(settings, job)),
        setup="\n".join([*threads, *choice.setup]),
        step=" ".join([f"--cpus-per-task={choice.cpus_per_task}"] if choice.cpus_per_task else []),
        command=" ".join([*map(shlex.quote, words), *share]),
        stopped=STOPPED,
    )


def submit(settings: Settings, stage: str, arguments: Sequence[str], dry_run: bool) -> list[str]:
    """Print the stage's batch scripts, or write them to RUN/slurm and submit them; return the jobs' numbers.

    Raises FileNotFoundError where there is no sbatch, ValueError where nothing is left to do, and with slurm's message
    where it refuses a job; those submitted before are cancelled then.
    """
    jobs = chain(settings, stage)
    if not jobs:
        raise ValueError(f"{settings.run}: {stage} is finished already")
    folder = _folder(settings)
    numbers: list[str] = []
    for place, job in enumerate(jobs):
        after = f", after {jobs[place - 1].name}" if place else ""
        text = script(settings, job, arguments, f"{job.name}: job {place + 1} of {len(jobs)}{after}")
        if dry_run:
            print(text)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{job.name}.sh"
        path.write_text(text, "utf-8")
        try:
            numbers.append(_sbatch(path, _wait_for(jobs[:place], numbers)))
        except ValueError:
            if numbers:
                subprocess.run(["scancel", *numbers], check=False)  # half a chain is of no use
            raise
        print(f"{numbers[-1]}  {path}{after}", flush=True)
    return numbers


def _options(settings: Settings, job: Job) -> list[str]:
    """What follows #SBATCH; the settings' own lines come last, and win."""
    choice, folder = settings.slurm, _folder(settings)
    options = [
        f"--job-name={shlex.quote(Path(settings.run).name)}-{job.name}",
        f"--chdir={shlex.quote(os.getcwd())}",
        f"--output={shlex.quote(str(folder / job.name))}{'-%A_%a' if job.array else '-%j'}.log",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={1 if job.alone else choice.tasks_per_node}",
        f"--time={choice.minutes}",
        f"--signal=B:USR1@{choice.warning_seconds}",
    ]
    optional: dict[str, object] = {
        "partition": choice.partition,
        "account": choice.account,
        "gpus-per-node": None if job.alone else choice.gpus_per_node,
        "cpus-per-task": choice.cpus_per_task,
        "array": f"0-{choice.array - 1}" if job.array else None,
    }
    options += [f"--{name}={value}" for name, value in optional.items() if value]
    options += choice.options
    for option in options:
        if len(option.splitlines()) > 1:
            raise ValueError(f"{option!r}: a batch script's options cannot have line breaks; rename what has one")
    return options


def _folder(settings: Settings) -> Path:
    return Path(settings.run) / "slurm"


def _wait_for(before: Sequence[Job], numbers: Sequence[str]) -> list[str]:
    """What a job waits for: that the one before has ended well.

    After an array, whose undone tasks the job does itself: that the one before the array has, and all tasks have ended.
    """
    if not before:
        return []
    if not before[-1].array:
        return [f"afterok:{numbers[-1]}"]
    return [*(f"afterok:{number}" for number in numbers[-2:-1]), f"afterany:{numbers[-1]}"]


def _sbatch(path: Path, waits_for: Sequence[str]) -> str:
    """Submit a script; return its job's number."""
    waiting = ["--kill-on-invalid-dep=yes", *([f"--dependency={','.join(waits_for)}"] if waits_for else [])]
    try:
        done = subprocess.run(["sbatch", "--parsable", *waiting, str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        raise FileNotFoundError("no sbatch here: submit from a slurm login node, or print with --dry-run") from None
    if done.returncode != 0:
        raise ValueError(f"sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
