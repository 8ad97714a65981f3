"""Collect the result tables of finished runs into one file: python benchmarks/collect.py NAME RUN [RUN ...] [--add].

Writes benchmarks/results/NAME.md, and NAME.json beside it. It measures nothing itself: numbers, dates and
versions come from the runs' report.json and provenance.json, the machine from where the script runs.
--add: runs of other names that the file has stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import RESULTS, processor

from drama_dist.evaluate.report import results_table

SETTINGS_SHOWN = ("seed", "llm", "encoder", "prune", "teacher", "augment", "train", "encode")


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect the result tables of finished runs.")
    parser.add_argument("name", help="of the results file")
    parser.add_argument("runs", nargs="+", type=Path, help="folders with report.json")
    parser.add_argument("--add", action="store_true", help="keep the results file's runs of other names")
    options = parser.parse_args()
    runs = [read_run(folder) for folder in options.runs]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    if options.add and path.exists():
        names = {run["run"] for run in runs}
        runs += [run for run in json.loads(path.read_text("utf-8")) if run["run"] not in names]
    markdown = "\n".join([f"# {options.name}\n", *map(as_markdown, runs)])
    path.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(markdown, "utf-8")
    print(path.with_suffix(".md"))


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself; paths of the machine are left out."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    evaluated = folder / "evaluate" / "corpus" / "provenance.json"
    provenance = json.loads(evaluated.read_text("utf-8"))
    corpus = json.loads((folder / "corpus" / "provenance.json").read_text("utf-8"))
    settings = report["settings"]
    trained = json.loads((folder / "train" / "provenance.json").read_text("utf-8"))
    return {
        "run": folder.name,
        "corpus": Path(settings["corpus"]["path"]).name,
        "passages": corpus["passages"],
        "queries": corpus["queries"],
        "finished": datetime.fromtimestamp(evaluated.stat().st_mtime, UTC).isoformat(timespec="minutes"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
        "python": provenance["python"],
        "versions": provenance["versions"],
        "git": provenance["git"],
        "dtype": trained.get("dtype", settings["train"]["dtype"]),  # older runs say it in the settings
        "settings": {name: settings[name] for name in SETTINGS_SHOWN},
        "seconds": report["seconds"],
        "results": report["results"],
    }


def as_markdown(run: dict[str, Any]) -> str:
    """One run as a section."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in run["seconds"].items())
    machine = run["machine"]
    return f"""## {run["run"]} (seed {run["settings"]["seed"]})

Corpus {run["corpus"]}: {run["passages"]} passages, {run["queries"]} test queries.
Finished {run["finished"]} on {machine["cores"]} cores of {machine["processor"]}, {machine["system"]},
in {run["dtype"]}; Python {run["python"]}, {versions}; commit {run["git"]}.

{results_table(run["results"], markdown=True)}

Seconds: {seconds}; {sum(run["seconds"].values()):.0f} in all.
"""


if __name__ == "__main__":
    main()
