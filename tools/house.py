"""Prints the size and shape of the code, and fails where it is over its limits.

    python tools/house.py

The rules. Lines: all lines of the Python files of `dpkd/`, `tools/` and `tests/`. Statements: every node `ast.stmt`,
docstrings included. A function is any `def`, nested ones too, from its `def` to its last line. A room is a folder or a
file at the top of `dpkd/`; a room stands one floor above the highest room that it imports, wherever in a file the
import stands, so the number of floors is the longest chain of rooms.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_STATEMENTS, MAX_FLOORS, MAX_TOP_FILES = 24_060, 16_120, 10, 10  # aim: 14_500, 9_500, 10, 10
MAX_TOOLS_LINES = 3_360
MEDIAN_FUNCTION, MAX_NINETIETH = range(7, 15), 40  # aim: 9 to 14


@dataclass(frozen=True)
class House:
    """What was measured of one folder of Python files."""

    trees: dict[str, ast.Module]
    """By dotted name; a package by the name of its folder."""
    num_lines: int

    @property
    def num_statements(self) -> int:
        """Nodes `ast.stmt`."""
        return sum(isinstance(node, ast.stmt) for tree in self.trees.values() for node in ast.walk(tree))

    @property
    def function_sizes(self) -> list[int]:
        """Lines of each function, ascending."""
        nodes = (node for tree in self.trees.values() for node in ast.walk(tree))
        return sorted(
            (node.end_lineno or node.lineno) - node.lineno + 1
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )

    @property
    def top_files(self) -> list[str]:
        """Modules at the top of the package."""
        return sorted(name for name in self.trees if name.count(".") == 1 and not self.is_folder(name))

    def is_folder(self, name: str) -> bool:
        """Whether the module is a package."""
        return any(other.startswith(f"{name}.") for other in self.trees)

    def imports(self, module: str) -> Iterator[tuple[str, int]]:
        """(dotted name, line) of everything imported, wherever in the file; `from a import b` gives `a.b`."""
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)

    def own_imports(self, module: str) -> Iterator[tuple[str, int]]:
        """(module of the same package, line) for each import of one."""
        for name, line in self.imports(module):
            if name.split(".")[0] == module.split(".", maxsplit=1)[0]:
                yield (name if name in self.trees else name.rpartition(".")[0]), line

    def floors(self) -> dict[str, int]:
        """The floor of each room, from 1; raises `graphlib.CycleError` with the circle of rooms."""
        below: dict[str, set[str]] = {}
        for module in self.trees:
            imported = {_room(name) for name, _ in self.own_imports(module)}
            below.setdefault(_room(module), set()).update(imported - {"", _room(module)})
        below.pop("", None)
        floors: dict[str, int] = {}
        for room in TopologicalSorter(below).static_order():
            floors[room] = 1 + max((floors[each] for each in below.get(room, ())), default=0)
        return floors


def measure(folder: Path) -> House:
    """Reads the Python files below a folder."""
    trees, num_lines = {}, 0
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        parts = path.relative_to(folder.parent).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(text, filename=str(path))
        num_lines += len(text.splitlines())
    return House(trees, num_lines)


def _room(module: str) -> str:
    """The first name below the package; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def faults(house: House) -> list[str]:
    """Which limits the package is over."""
    sizes = house.function_sizes
    median, ninetieth = sizes[len(sizes) // 2], sizes[len(sizes) * 9 // 10]
    try:
        num_floors = max(house.floors().values())
    except CycleError as error:
        return [f"rooms import one another in a circle: {' -> '.join(error.args[1])}"]
    limits = (
        (house.num_lines > MAX_LINES, f"{house.num_lines:,} lines, more than {MAX_LINES:,}"),
        (house.num_statements > MAX_STATEMENTS, f"{house.num_statements:,} statements, more than {MAX_STATEMENTS:,}"),
        (num_floors > MAX_FLOORS, f"{num_floors} floors, more than {MAX_FLOORS}"),
        (len(house.top_files) > MAX_TOP_FILES, f"{len(house.top_files)} files at the top, more than {MAX_TOP_FILES}"),
        (median not in MEDIAN_FUNCTION, f"functions of {median} lines in the median, not 9 to 14"),
        (ninetieth > MAX_NINETIETH, f"a tenth of the functions has over {MAX_NINETIETH} lines: {ninetieth}"),
    )
    return [fault for over, fault in limits if over]


def main() -> int:
    """Prints the table; 1 where a limit is passed."""
    print(__doc__.partition("The rules. ")[2])
    houses = {name: measure(ROOT / name) for name in ("tests", "tools", "dpkd")}
    for name, house in houses.items():
        sums = f"{house.num_lines:>7,} lines {house.num_statements:>7,} statements {len(house.trees):>4} files"
        print(f"{name + '/':<7}{sums}")
    median, ninetieth = (house.function_sizes[len(house.function_sizes) * tenth // 10] for tenth in (5, 9))
    print(f"{len(house.function_sizes):,} functions: median {median} lines, 90th percentile {ninetieth}")
    floors = house.floors()
    for floor in range(max(floors.values()), 0, -1):
        print(f"  floor {floor:>2}  {' '.join(sorted(room for room in floors if floors[room] == floor))}")
    over = faults(house)
    if houses["tools"].num_lines > MAX_TOOLS_LINES:
        over.append(f"tools/ has {houses['tools'].num_lines:,} lines, more than {MAX_TOOLS_LINES:,}")
    print("\n".join(f"over the limit: {fault}" for fault in over) or "within all limits")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
