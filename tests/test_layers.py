"""Imports run down the layers, engines stay behind `backends`, files and functions stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "dpkd"

# Low to high. A module imports from its own room and the lines below it; rooms on one line do not import each other.
LAYERS = (
    ("section", "errors", "settings_errors", "strict_yaml", "untrusted", "heartbeat", "stop_signals"),
    ("storage_errors", "watchdog", "checked_json", "forking", "lasting_folder"),
    ("storage",),
    ("shard_cache",),
    ("world",),
    ("average", "optimizer"),
    ("engine_state",),
    ("engine", "pool", "placement"),
    ("report",),
    ("gang",),
    ("data",),
    ("models",),
    ("priors",),
    ("evaluation",),
    ("objectives",),
    ("train",),
    ("stages",),
    ("backends",),
    ("settings",),
    ("plan", "inspection", "doctor"),
    ("session",),
    ("pretrain", "audit"),
    ("cli",),
)
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = ("torch", "timm", "ray", "deepspeed", "numba", "onnx", "onnxruntime")

# What a part can be told. They only declare, on top of `section`, so any layer may read them.
DECLARATIONS = {f"dpkd.{room}.settings" for room in ("data", "evaluation", "models", "objectives", "train")}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
LONG_FOR_A_REASON: dict[str, str] = {}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {_dotted(path): ast.parse(path.read_text(), filename=str(path)) for path in paths}


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """The first name below `dpkd`; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields (dotted name, line) of everything imported, wherever in the file; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _project_imports(trees: dict[str, ast.Module], module: str) -> Iterator[tuple[str, int]]:
    """Yields (module of dpkd, line) for each import of one."""
    for name, line in _imports(trees[module]):
        if name.split(".")[0] == "dpkd":
            yield (name if name in trees else name.rpartition(".")[0]), line


def test_every_room_has_a_layer() -> None:
    unknown = {_room(module) for module in modules()} - {"", *HEIGHT}
    assert not unknown, f"rooms without a layer: {sorted(unknown)}; add them to LAYERS"


def test_imports_run_down_the_layers() -> None:
    trees = modules()
    wrong = [
        f"{module}:{line} imports {imported}"
        for module in trees
        for imported, line in _project_imports(trees, module)
        if _room(imported) not in ("", _room(module))
        and imported not in DECLARATIONS
        and HEIGHT.get(_room(imported), 0) >= HEIGHT.get(_room(module), len(LAYERS))
    ]
    assert not wrong, "\n".join(wrong)


def test_declarations_import_no_other_room() -> None:
    trees = modules()
    imported = {name for module in DECLARATIONS for name, _ in _project_imports(trees, module)}
    assert imported <= {"dpkd.section"}


def test_there_is_no_cycle_of_imports() -> None:
    trees = modules()
    edges = {module: {name for name, _ in _project_imports(trees, module)} - {module} for module in trees}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for imported in edges.get(module, ()):
                visit(imported, (*path, module))
            done.add(module)

    for module in trees:
        visit(module, ())


def test_ray_and_deepspeed_are_imported_in_backends_alone() -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module, tree in modules().items()
        for name, line in _imports(tree)
        if name.split(".")[0] in ("ray", "deepspeed") and _room(module) != "backends"
    ]
    assert not wrong, "\n".join(wrong)


def test_settings_load_without_a_heavy_package() -> None:
    code = f"import sys, dpkd.settings; print([name for name in {HEAVY!r} if name in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


def test_files_and_functions_stay_small() -> None:
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = str(path.relative_to(PACKAGE)), path.read_text()
        if len(text.splitlines()) > MAX_FILE_LINES:
            long.append((name, f"{name}: {len(text.splitlines())} lines"))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    long.append((f"{name}:{node.name}", f"{name}:{node.lineno} {node.name}: {size} lines"))
    wrong = [line for key, line in long if key not in LONG_FOR_A_REASON]
    assert not wrong, "split them by subject, or give the reason in LONG_FOR_A_REASON:\n" + "\n".join(wrong)
