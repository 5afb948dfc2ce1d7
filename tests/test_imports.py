"""Who may import whom (DESIGN.md), and what the command line must not load to answer quickly."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

from planner.placement import savings

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "planner": {"planner"},
    "executor": {"planner", "executor"},
    "profiles": {"planner", "executor", "profiles"},
    "reports": {"planner", "reports"},
}
ROOMS = ("basis", "orders", "values", "programs", "costs", "simulate", "placement", "search", "store", "cli")
"""Rooms of the planner, each above those that it may import."""
HEAVY = ("torch", "plotly", "numba", "pandas", "sklearn")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_run_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        if path.is_relative_to(ROOT / "planner" / "cli"):
            continue  # the command line imports the others inside its commands
        ours = {name.partition(".")[0] for name in imports(path)} & set(ALLOWED)
        assert ours <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {ours - ALLOWED[package]}"
        assert not any(name.startswith("planner.cli") for name in imports(path)), f"{path} imports the command line"


def test_executor_does_not_see_the_simulator() -> None:
    for path in (ROOT / "executor").rglob("*.py"):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("planner.")}
        assert rooms <= {"basis", "orders", "values", "programs"}, path


def test_rooms_of_the_planner_stand_on_each_other() -> None:
    """Lower rooms never import higher ones, and no file of a room takes part in a circle."""
    folder = ROOT / "planner"
    edges: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found = {name for name in imports(path) if name.startswith("planner.")}
        edges[own] = found
        room = own.split(".")[1] if "." in own else ""
        if room in ROOMS:
            higher = set(ROOMS[ROOMS.index(room) + 1 :]) & {name.split(".")[1] for name in found}
            assert not higher, f"{own} is below {higher}"
    modules = nx.DiGraph([(a, b) for a, targets in edges.items() for b in targets if b in edges and a != b])
    modules.remove_edges_from([(a, b) for a, b in modules.edges if a.startswith(f"{b}.") or b.startswith(f"{a}.")])
    assert nx.is_directed_acyclic_graph(modules), nx.find_cycle(modules)


def private(path: Path) -> set[str]:
    """The private names that a file takes from a module of torch, or reads of anything but itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if "._" in alias.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found |= {name for name in (f"{node.module}.{alias.name}" for alias in node.names) if "._" in name}
        elif (
            isinstance(node, ast.Attribute)
            and re.match(r"_[a-z]", node.attr)
            and node.attr not in ("_replace", "_asdict")
        ):
            found |= {ast.unparse(node)} - {f"self.{node.attr}", f"cls.{node.attr}"}
    return found


@pytest.mark.parametrize("package", ["executor", "profiles"])
def test_private_names_of_torch_live_in_one_module(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        if path.name != "torch_adapter.py":
            assert private(path) == set(), path
            assert not any(name.startswith("torch.distributed.pipelining") for name in imports(path)), path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([c, "--help"] for c in ("init", "profile", "simulate", "search", "show", "explain", "run", "report")),
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom planner.cli.main import invoke\n"
        f"code = invoke({arguments!r})\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert "Usage: plan" in done.stdout


def test_simulate_loads_no_torch(tmp_path: Path) -> None:
    code = """
import sys, msgspec
from pathlib import Path
from tests.factory import profile
Path("p.json").write_bytes(msgspec.json.encode(profile([1.0] * 4)))
from planner.cli.main import invoke
code = invoke(["simulate", "--k", "2", "--m", "4", "--profile", "p.json", "--json"])
print("HEAVY", [m for m in ("torch", "plotly", "numba", "pandas") if m in sys.modules], file=sys.stderr)
sys.exit(code)
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr


def test_no_saving_is_known_by_its_name() -> None:
    """What differs between savings is said in their entries: no string is compared with a name elsewhere."""
    names = set(savings.names())
    for path in (ROOT / "planner").rglob("*.py"):
        if path.name == "savings.py" and path.parent.name == "placement":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.BinOp):
                found = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)} & names
                assert not found, f"{path}:{node.lineno}: {found}"
