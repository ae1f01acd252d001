"""`dpkd.fit`: a whole run from Python, with settings that are chosen for the images."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.defaults import chosen_settings
from dpkd.errors import EXIT_STOPPED, EXIT_USER, StopRequested, UserError
from dpkd.stages.rows import override


@dataclass(frozen=True)
class Fitted:
    """A finished run."""

    folder: Path
    exports: dict[str, Path]
    """The timm folder of each student."""
    summary: dict[str, Any]
    """The content of `summary.json`."""


def fit(
    source: Path | str,
    *,
    students: Sequence[str] | str = (),
    teacher: Path | str = "auto",
    out: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Fitted:
    """Trains students on a folder or table of images, as `dpkd pretrain SOURCE` does; the same call continues a run.

    `students` are timm models, `teacher` is a timm model or a file of its weights, `out` is the run folder, and
    `settings` has values by key, such as `{"distill.training.epochs": 100}`. The run is a process of its own, so this
    works in notebooks and in scripts without a main guard; its lines are printed. Raises `UserError` for input that
    cannot be used, `StopRequested` for a run that was stopped, and `RuntimeError` for one that failed.
    """
    given = dict(settings or {}) | ({} if out is None else {"run.dir": str(out)})
    overrides = [f"{key}={value}" if isinstance(value, str) else override(key, value) for key, value in given.items()]
    names = (students if isinstance(students, str) else ",".join(students)) or None
    chosen, _ = chosen_settings(str(source), overrides, students=names, teacher=str(teacher))
    options = ["--teacher", str(teacher), *(["--students", names] if names else [])]
    command = [sys.executable, "-m", "dpkd.pretrain", f"data.source={source}", *overrides, *options]
    error = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as run:
        assert run.stdout is not None
        try:
            for line in run.stdout:
                sys.stdout.write(line)
                error = line if line.startswith("error: ") else error and error + line
        except BaseException:
            run.terminate()  # it saves what it has
            raise
    if run.returncode == EXIT_STOPPED:
        raise StopRequested("the run was stopped; the same call goes on from there")
    if run.returncode == EXIT_USER:
        raise UserError(error.removeprefix("error: ").strip())
    if run.returncode:
        raise RuntimeError(error or f"the run ended with exit code {run.returncode}; its last lines are above")
    summary = json.loads((Path(chosen.run.dir) / "summary.json").read_text())
    exports = {name: Path(path) for name, path in summary["exports"].items()}
    return Fitted(Path(chosen.run.dir), exports, summary)
