"""Slurm jobs for the stages: filled in from the settings, then printed or submitted.

Which stages have jobs, and which are array jobs, is in run/graph.py. An array is followed by a job that finishes its
stage; each job of a chain waits for the one before. The batch script is launcher/slurm/job.sh; what a job does when it
is warned of its time limit is in interrupts.py.
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

from drama_dist.run.graph import STAGES, Artefact, artefacts_of, command_of, function_named, is_finished, order_of
from drama_dist.run.interrupts import STOPPED
from drama_dist.settings import Settings


@dataclass(frozen=True)
class Job:
    """One batch job: a `drama` command on `nodes` machines, or an array of tasks on one machine each.

    alone: a single process does all the work.
    """

    name: str
    command: tuple[str, ...]
    nodes: int = 1
    array: bool = False
    alone: bool = False


class _Script(Template):
    delimiter = "%%"  # $ is left to the shell


def submitted_verbs() -> list[str]:
    """The commands that can be submitted: run, and those of stages with jobs of their own."""
    return ["run", *dict.fromkeys(stage.verb for stage in STAGES if stage.processes)]


def chain(settings: Settings, verb: str) -> list[Job]:
    """The jobs, in order, for everything a command makes or needs that is not finished yet."""
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
    slurm = settings.slurm
    share = ("--share", f"$SLURM_ARRAY_TASK_ID/{slurm.array}") if job.array else ()
    verb, *options = job.command
    words = [sys.executable, "-m", "drama_dist.cli", verb, *arguments, *options]
    threads = [f"export OMP_NUM_THREADS={slurm.cpus_per_task}"] if slurm.cpus_per_task else []
    return _Script(files("drama_dist.launcher").joinpath("slurm", "job.sh").read_text("utf-8")).substitute(
        title=title,
        options="\n".join(f"#SBATCH {option}" for option in _options(settings, job)),
        setup="\n".join([*threads, *slurm.setup]),
        step=" ".join([f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []),
        command=" ".join([*map(shlex.quote, words), *share]),
        stopped=STOPPED,
    )


def submit(settings: Settings, stage: str, arguments: Sequence[str], dry_run: bool) -> list[str]:
    """Print the stage's batch scripts, or write them to RUN/slurm and submit them; return the job ids.

    Before anything is submitted the collections are checked, as `drama STAGE` does; not the models, since endpoints
    need not be reached from here. Raises what these checks do, FileNotFoundError if there is no sbatch, ValueError if
    nothing is left to do or, with slurm's message, if slurm refuses a job; jobs submitted before that one are then
    cancelled.
    """
    jobs = chain(settings, stage)
    if not jobs:
        raise ValueError(f"{settings.run}: {stage} is finished already")
    if not dry_run:
        _check_collections(settings, stage)
    folder = _folder(settings)
    job_ids: list[str] = []
    for index, job in enumerate(jobs):
        after = f", after {jobs[index - 1].name}" if index else ""
        text = script(settings, job, arguments, f"{job.name}: job {index + 1} of {len(jobs)}{after}")
        if dry_run:
            print(text)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{job.name}.sh"
        path.write_text(text, "utf-8")
        try:
            job_ids.append(_sbatch(path, _dependencies(jobs[:index], job_ids)))
        except ValueError:
            if job_ids:
                subprocess.run(["scancel", *job_ids], check=False)  # half a chain is useless
            raise
        print(f"{job_ids[-1]}  {path}{after}", flush=True)
    return job_ids


def _check_collections(settings: Settings, verb: str) -> None:
    for artefact in order_of(settings, *artefacts_of(settings, verb)):
        stage = artefact.stage
        if stage.verb == "corpus" and stage.check and not is_finished(settings.run, artefact.name):
            function_named(stage.check)(settings, **artefact.parameters)


def _options(settings: Settings, job: Job) -> list[str]:
    """The #SBATCH options; those of slurm.options come last and take precedence."""
    slurm, folder = settings.slurm, _folder(settings)
    options = [
        f"--job-name={shlex.quote(f'{Path(settings.run).name}-{job.name}')}",
        f"--chdir={shlex.quote(os.getcwd())}",
        f"--output={shlex.quote(str(folder / job.name))}{'-%A_%a' if job.array else '-%j'}.log",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={1 if job.alone else slurm.tasks_per_node}",
        f"--time={slurm.minutes}",
        f"--signal=B:USR1@{slurm.warning_seconds}",
    ]
    optional: dict[str, object] = {
        "partition": slurm.partition,
        "account": slurm.account,
        "gpus-per-node": None if job.alone else slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "array": f"0-{slurm.array - 1}" if job.array else None,
    }
    options += [f"--{name}={value}" for name, value in optional.items() if value]
    options += slurm.options
    for option in options:
        if len(option.splitlines()) > 1:
            raise ValueError(f"{option!r}: a batch script's options cannot have line breaks; remove the line break")
    return options


def _folder(settings: Settings) -> Path:
    return Path(settings.run) / "slurm"


def _dependencies(before: Sequence[Job], job_ids: Sequence[str]) -> list[str]:
    """What a job waits for: the job before it must have succeeded.

    After an array it is enough that all tasks have ended, since the job does what they left undone; but the job before
    the array must have succeeded.
    """
    if not before:
        return []
    if not before[-1].array:
        return [f"afterok:{job_ids[-1]}"]
    return [*(f"afterok:{job_id}" for job_id in job_ids[-2:-1]), f"afterany:{job_ids[-1]}"]


def _sbatch(path: Path, dependencies: Sequence[str]) -> str:
    """Submit a script; return its job id."""
    options = ["--kill-on-invalid-dep=yes", *([f"--dependency={','.join(dependencies)}"] if dependencies else [])]
    try:
        done = subprocess.run(["sbatch", "--parsable", *options, str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        raise FileNotFoundError("sbatch not found: submit from a slurm login node, or print with --dry-run") from None
    if done.returncode != 0:
        raise ValueError(f"sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
