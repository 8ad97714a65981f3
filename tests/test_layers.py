"""The import layers: who may import whom, and that no file outgrows a reader."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = (
    {
        "records",
        "settings",
        "settings_file",
        "setting_types",
        "learning_settings",
        "labels",
        "suites",
        "run",
        "distributed",
        "kernels",
    },
    {"corpus", "encoder"},
    {"search"},
    {"augment", "prune", "train", "evaluate"},
    {"export", "plan", "cli", "launcher"},
)
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
WITHIN_A_ROOM = {3}  # rooms of this layer know each other only through files


def sources() -> list[tuple[str, Path]]:
    """(room, file) of every source file."""
    found = []
    for path in sorted((ROOT / "drama_dist").rglob("*.py")):
        first = path.relative_to(ROOT / "drama_dist").parts[0].removesuffix(".py")
        if first != "__init__":
            found.append((first, path))
    for room in ("kernels", "launcher"):
        found += [(room, path) for path in sorted((ROOT / room).rglob("*.py"))]
    return found


def imported(path: Path) -> set[str]:
    """Modules that a file names in import statements, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(room: str, path: Path) -> list[str]:
    wrong = []
    for name in imported(path):
        parts = name.split(".")
        if parts[0] in ("benchmarks", "tests"):
            wrong.append(f"{path}: imports {name}")
        if parts[0] != "drama_dist" or len(parts) < 2 or parts[1] not in LAYER_OF or parts[1] == room:
            continue
        own, other = LAYER_OF[room], LAYER_OF[parts[1]]
        if other > own or (other == own and own in WITHIN_A_ROOM):
            wrong.append(f"{path}: layer {own} imports {name} of layer {other}")
        if parts[1] == "kernels" and room not in ("encoder", "train", "plan"):
            wrong.append(f"{path}: only encoder, train and plan import kernels")
    return wrong


def test_imports_follow_the_layers() -> None:
    assert not [line for room, path in sources() for line in violations(room, path)]


def modules() -> dict[str, set[str]]:
    """Every source module, and those that it imports, wherever the statement stands."""
    files = {}
    for room, path in sources():
        folder = ROOT if room in ("kernels", "launcher") else ROOT / "drama_dist"
        name = ".".join(["drama_dist", *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
        files[name] = path
    graph = {}
    for name, path in files.items():
        named = {full if full in files else full.rpartition(".")[0] for full in imported(path)}
        graph[name] = {other for other in named if other in files and other != name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none where there is no circle."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_have_no_circle() -> None:
    graph = modules()
    assert len(graph) > 80 and not circle(graph)
    assert circle(graph | {"drama_dist.records": {"drama_dist.train.loop"}})  # which imports it


def test_the_check_finds_a_wrong_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from drama_dist.train.loop import train\n", "utf-8")
    assert violations("search", bad) and violations("augment", bad) and not violations("cli", bad)


def test_only_one_module_talks_to_torch_distributed_and_two_to_deepspeed() -> None:
    users: dict[str, set[str]] = {"torch.distributed": set(), "deepspeed": set()}
    for _, path in sources():
        for name in imported(path):
            for library in users:
                if name == library or name.startswith(f"{library}."):
                    users[library].add(path.stem)
    assert users == {"torch.distributed": {"ranks"}, "deepspeed": {"engine", "zero_state"}}


def test_every_source_file_belongs_to_a_layer_and_has_at_most_500_lines() -> None:
    for room, path in [*sources(), *(("tests", path) for path in (ROOT / "tests").rglob("*.py"))]:
        assert room in LAYER_OF or room == "tests", f"{path}: which layer?"
        assert len(path.read_text("utf-8").splitlines()) <= 500, path
