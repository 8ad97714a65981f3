"""The wheel: one name at top level, everything that the program reads inside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = {
    "drama_dist/py.typed",
    "drama_dist/export/model_card.md",
    "drama_dist/evaluate/report.html",
    "drama_dist/kernels/info_nce/loss.py",
    "drama_dist/kernels/info_nce/tiles.cpp",
    "drama_dist/kernels/llama_cpu/attention.cpp",
    "drama_dist/kernels/products.h",
    "drama_dist/launcher/slurm/job.sh",
    "drama_dist/launcher/train.py",
    "drama_dist/prune/extractor.py",
}


def test_the_wheel_holds_only_drama_dist(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("drama_dist", "kernels", "launcher"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"drama_dist"}
    assert set(names) >= NEEDED
