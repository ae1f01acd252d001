"""Breaks the code in 100 small seeded ways, one at a time, and says which of them the tests notice.

    python -m tests.reference.mutants --out FILE.jsonl [--root DIR] [--seed 0] [--number 100] [FILE ...]

The checkout at `--root` is copied once, and only the copy is changed. FILE are paths below it, or patterns; without
any, the order, the checkpoints, the objectives and the engines, in the layout that the checkout has. Equally many
mutants are drawn for each of these four groups. A mutant is a comparison, an operator, a constant or a condition that
is changed, or a statement that is dropped. It meets the tests that run its line in their own process, then, where none
of them fails, the other tests that import its module, directly or through a module of `tests/`; no chaos, fuzz, Ray or
object store. The lines of each test are measured once, by `pip install coverage`.

The file gets one line for each mutant, {"id", "group", "file", "line", "change", "result": "killed" | "survived",
"by": test, "seconds"}; a mutant that is there already is left out, so the same command goes on after a stop. All
tests that are not slow run once without a mutant first; FILE.coverage keeps their lines: remove it after a change.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FILES = (
    *("dpkd/data/order.py", "dpkd/train/checkpoint.py", "dpkd/train/checkpoint_store.py"),
    *("dpkd/io/checkpoint_store.py", "dpkd/objectives/*.py", "dpkd/engine/*.py", "dpkd/engine.py"),
    *("dpkd/engine_state.py", "dpkd/optimizer.py", "dpkd/average.py", "dpkd/models/batch_norm.py"),
    *("dpkd/schedule.py", "dpkd/world.py"),
)
NOT_MUTATED = re.compile(r"__init__|settings|protocol")
"""Files without behaviour: settings are checked by their own tests."""
NOT_RUN = re.compile(r"chaos/|fuzz/|gpu/|stages/|reference/|object_stor|_ray|pretrain|layers|cluster|gang|group|listen")
LONGEST_S = 3600.0
TIMEOUT_S = 1200.0
"""Of the tests of one mutant; a mutant whose tests take longer counts as killed."""
GROUPS = {"order": r"data/order", "checkpoint": r"checkpoint", "objectives": r"objectives/", "engine": r""}

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.MatMult: ast.Mult,
}


def changes(node: ast.AST) -> Iterator[str]:
    """The ways in which a node can be changed."""
    match node:
        case ast.Compare():
            yield "comparison"
        case ast.BinOp() | ast.AugAssign():
            yield "operator"
        case ast.BoolOp():
            yield "and/or"
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "unary"
        case ast.Constant(value=bool() | int() | float()):
            yield "constant"
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "negated condition"
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Raise) or _is_call(node):
        yield "dropped statement"


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and "logger" not in ast.unparse(node)


def change(node: ast.AST, kind: str, draw: random.Random) -> ast.AST | None:
    """Changes the node in place, or gives back what takes its place."""
    match kind, node:
        case "comparison", ast.Compare():
            place = draw.randrange(len(node.ops))
            node.ops[place] = COMPARISONS[type(node.ops[place])]()
        case "operator", ast.BinOp() | ast.AugAssign():
            node.op = OPERATORS[type(node.op)]()
        case "and/or", ast.BoolOp():
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        case "unary", ast.UnaryOp():
            return node.operand
        case "constant", ast.Constant():
            value = node.value
            node.value = not value if isinstance(value, bool) else value + draw.choice((-1, 1))  # type: ignore[operator]
        case "negated condition", ast.If() | ast.While() | ast.IfExp():
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case "dropped statement", _:
            return ast.Pass()
    return None


def behaviour(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that do something: no annotations, type aliases at the top, decorators, or checks of our own."""
    hidden: set[int] = set()
    for node in ast.walk(tree):
        silent: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef):
            silent = [*node.decorator_list, node.returns]
        elif isinstance(node, ast.arg | ast.AnnAssign):
            silent = [node.annotation]
        elif isinstance(node, ast.Assert):
            silent = [node]
        elif isinstance(node, ast.Module):
            silent = [each for each in node.body if isinstance(each, ast.Assign)]
        hidden |= {id(inner) for each in silent if each is not None for inner in ast.walk(each)}
    yield from (node for node in ast.walk(tree) if id(node) not in hidden)


def sites(text: str) -> list[tuple[int, str]]:
    """(number of the node, kind of change) of each possible change."""
    nodes = behaviour(ast.parse(text))
    return [(number, kind) for number, node in enumerate(nodes) for kind in changes(node)]


class Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        """The node, or what takes its place."""
        return self._new if node is self._old else self.generic_visit(node)


def mutated(text: str, number: int, kind: str, *, seed: str) -> tuple[str, range, str]:
    """The text with one change, its lines from the start of the statement on, and the change in words."""
    tree = ast.parse(text)
    node = list(behaviour(tree))[number]
    line = getattr(node, "lineno", 0)
    within = (
        each for each in ast.walk(tree) if isinstance(each, ast.stmt) and each.lineno <= line <= (each.end_lineno or 0)
    )
    lines = range(max(each.lineno for each in within), line + 1)
    before = ast.unparse(node).splitlines()[0]
    other = change(node, kind, random.Random(seed))
    if other is not None:
        Replace(node, other).visit(tree)
    after = ast.unparse(ast.fix_missing_locations(other or node)).splitlines()[0]
    return ast.unparse(ast.fix_missing_locations(tree)), lines, f"{kind}: {before} -> {after}"


def module_of(path: str) -> str:
    """The dotted name of a file."""
    return path.removesuffix(".py").replace("/", ".")


def tests_of(module: str, root: Path) -> list[str]:
    """The test files that import the module, directly or through modules of `tests/`."""
    package, _, name = module.rpartition(".")
    pattern = rf"\b{re.escape(module)}\b|from {re.escape(package)} import [^\n]*\b{name}\b"
    own = re.compile(pattern + (r"|from dpkd\.objectives import" if package == "dpkd.objectives" else ""))
    texts = {module_of(str(path.relative_to(root))): path.read_text() for path in (root / "tests").rglob("*.py")}
    touching = {each for each, text in texts.items() if own.search(text)}
    while True:
        mentions = {
            each
            for each, text in texts.items()
            if any(re.search(rf"\b{re.escape(other)}\b", text) for other in touching if ".test_" not in other)
        }
        if mentions <= touching:
            break
        touching |= mentions
    paths = (each.replace(".", "/") + ".py" for each in touching if "test_" in each.rpartition(".")[2])
    return sorted(path for path in paths if not NOT_RUN.search(path) and (root / path).exists())


def run_tests(
    root: Path, tests: list[str], *options: str, prefix: tuple[str, ...] = (), timeout_s: float
) -> str | None:
    """The first test that fails, "time" where they take too long, or None where all pass."""
    command = [sys.executable, *prefix, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--timeout=400", *options, *tests],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "time"
    if process.returncode in (0, 5):  # 5: no test has these marks
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed[1] if failed else f"exit {process.returncode}: {output[-300:]}"


class TestsByLine:
    """Which test functions run a line in their own process."""

    def __init__(self, root: Path, tests: list[str], *, place: Path) -> None:
        """Runs all tests once, and ends the program where one fails; the lines stay in the file `place`."""
        if not place.exists():
            settings = place.with_name(f"{place.name}.settings")
            measured = place.with_name(f"{place.name}.part")
            settings.write_text(f"[run]\ndata_file = {measured}\ndynamic_context = test_function\ninclude = dpkd/*\n")
            prefix = ("-m", "coverage", "run", f"--rcfile={settings}")
            failed = run_tests(root, tests, "-m", "not chaos and not slow", prefix=prefix, timeout_s=LONGEST_S)
            if failed is not None:
                sys.exit(f"without any mutant {failed} fails: mend that first")
            settings.unlink()
            measured.rename(place)
        self._data = CoverageData(str(place))
        self._data.read()
        (self._copy,) = {
            path.removesuffix("dpkd/__init__.py")
            for path in self._data.measured_files()
            if path.endswith("/dpkd/__init__.py")
        }

    def of(self, path: str, lines: range) -> list[str]:
        """The tests that run one of these lines of a file, those first that run few lines of it."""
        contexts = self._data.contexts_by_lineno(f"{self._copy}{path}")
        reach = Counter(name for names in contexts.values() for name in names)
        found = {name for line in lines for name in contexts.get(line, []) if name}
        ordered = sorted(found, key=lambda name: (reach[name], name))
        return [
            f"{module.replace('.', '/')}.py::{name}" for module, _, name in (each.rpartition(".") for each in ordered)
        ]


def first_to_notice(root: Path, quick: list[str], tests: list[str], *, timeout_s: float) -> str | None:
    """The test that notices what is wrong with the code: those that run the line first, then all others."""
    if quick and (by := run_tests(root, quick, "-m", "not chaos", timeout_s=timeout_s)):
        return by
    others = [option for test in quick for option in ("--deselect", test)]
    return run_tests(root, tests, "-m", "not chaos", *others, timeout_s=timeout_s)


def group_of(path: str) -> str:
    """The group that a file belongs to."""
    return next(name for name, pattern in GROUPS.items() if re.search(pattern, path))


def id_of(path: str, node: int, kind: str) -> str:
    """The name of a mutant, for as long as its file stays as it is."""
    return f"{path}:{node}:{kind}"


def draw(root: Path, files: list[str], *, number: int, seed: int) -> list[tuple[str, int, str]]:
    """(file, node, kind) of the mutants, equally many for each group."""
    by_group: dict[str, list[tuple[str, int, str]]] = {}
    for path in files:
        found = [(path, node, kind) for node, kind in sites((root / path).read_text())]
        by_group.setdefault(group_of(path), []).extend(found)
    share = -(-number // len(by_group))
    drawn = []
    for name, places in sorted(by_group.items()):
        drawn += random.Random(f"{seed} {name}").sample(places, min(share, len(places)))
    random.Random(seed).shuffle(drawn)  # an unfinished table has something of each group
    return drawn


def main() -> int:
    """Tries the mutants that are left, and prints how many were killed; 1 where the tests fail without a mutant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="files or patterns below the root")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="checkout to try; this one")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="results, one line each")
    parser.add_argument("--number", type=int, default=100, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn from")
    options = parser.parse_args()
    patterns = options.files or DEFAULT_FILES
    paths = sorted({str(path.relative_to(options.root)) for each in patterns for path in options.root.glob(each)})
    files = [path for path in paths if not NOT_MUTATED.search(path)]
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "checkout"
        shutil.copytree(options.root, copy, ignore=shutil.ignore_patterns(".git", "runs", "build", "data/sample", ".*"))
        mutants = draw(options.root, files, number=options.number, seed=options.seed)
        left = [each for each in mutants if not any(line["id"] == id_of(*each) for line in done)]
        tests_by_file = {path: tests_of(module_of(path), copy) for path, _, _ in mutants}
        all_tests = sorted({test for tests in tests_by_file.values() for test in tests})
        reached = TestsByLine(copy, all_tests, place=options.out.with_suffix(".coverage").resolve())
        for path, node, kind in left:
            name, text = id_of(path, node, kind), (options.root / path).read_text()
            began = time.monotonic()
            changed, lines, words = mutated(text, node, kind, seed=f"{options.seed} {name}")
            quick = reached.of(path, lines)
            (copy / path).write_text(changed)
            by = first_to_notice(copy, quick, tests_by_file[path], timeout_s=TIMEOUT_S)
            (copy / path).write_text(text)
            result = {"id": name, "group": group_of(path), "file": path, "line": lines[-1], "change": words}
            result |= {"result": "survived" if by is None else "killed", "by": by}
            done.append(result | {"seconds": round(time.monotonic() - began, 1)})
            with options.out.open("a") as out:
                out.write(json.dumps(done[-1]) + "\n")
            print(f"{done[-1]['result']:<9} {path}:{lines[-1]} {words} ({by})", flush=True)
    for group in GROUPS:
        count = Counter(line["result"] for line in done if line["group"] == group)
        print(f"{group:<11} {count['killed']} of {count.total()} killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
