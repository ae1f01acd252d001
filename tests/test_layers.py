"""Imports run down from room to room, engines stay behind `backends`, files and functions stay small."""

import ast
import subprocess
import sys

from tools.house import ROOT, faults, measure

HEAVY = ("torch", "timm", "ray", "deepspeed", "numba", "onnx", "onnxruntime")

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def test_rooms_import_one_another_in_no_circle() -> None:
    floors = measure(ROOT / "dpkd").floors()  # raises with the circle
    files = (path.relative_to(ROOT / "dpkd") for path in (ROOT / "dpkd").rglob("*.py"))
    assert floors.keys() == {path.parts[0].removesuffix(".py") for path in files} - {"__init__"}


def test_modules_import_one_another_in_no_circle() -> None:
    house = measure(ROOT / "dpkd")
    edges = {module: {name for name, _ in house.own_imports(module)} - {module} for module in house.trees}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for imported in edges.get(module, ()):
                visit(imported, (*path, module))
            done.add(module)

    for module in house.trees:
        visit(module, ())


def test_ray_and_deepspeed_are_imported_in_backends_alone() -> None:
    house = measure(ROOT / "dpkd")
    wrong = [
        f"{module}:{line} imports {name}"
        for module in house.trees
        for name, line in house.imports(module)
        if name.split(".")[0] in ("ray", "deepspeed") and not module.startswith("dpkd.backends")
    ]
    assert not wrong, "\n".join(wrong)


def test_settings_load_without_a_heavy_package() -> None:
    code = f"import sys, dpkd.settings; print([name for name in {HEAVY!r} if name in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


def test_the_house_is_within_its_limits() -> None:
    assert not faults(measure(ROOT / "dpkd")), "python tools/house.py says more"


def test_files_and_functions_stay_small() -> None:
    long = []
    for path in sorted((ROOT / "dpkd").rglob("*.py")):
        text = path.read_text()
        if len(text.splitlines()) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {size} lines")
    assert not long, "split them by subject:\n" + "\n".join(long)
