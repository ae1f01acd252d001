"""TensorBoard files of a stage: one TensorBoard run per network, so that networks share their charts.

<folder>/              speed/…, goodput/…, quarantine/…, once per stage; the summary's text, and the page HParams
<folder>/<network>/    loss/<objective>, training/learning_rate, training/gradient_norm, few_shot/…, accuracy/…, panels
"""

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dpkd.io.errors import write_errors
from dpkd.report.quarantine import Quarantine


class Board:
    """Writes the TensorBoard files of one stage, on rank 0 alone.

    Training continues from `start_step`: TensorBoard drops the later steps of an interrupted run. Every method raises
    the error of `write_errors` if the disk is full or fails.
    """

    def __init__(self, folder: Path | str, *, start_step: int = 0) -> None:
        threading.excepthook = _print_unless_writer
        self._folder = Path(folder)
        self._start_step = start_step
        self._writers: dict[str, SummaryWriter] = {}
        self._banded: set[str] = set()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes numbers by name; the numbers of a network, such as `loss/<network>/<objective>`, go to its run."""
        runs: dict[str, dict[str, float]] = defaultdict(dict)
        for name, number in numbers.items():
            match name.split("/"):
                case ["loss", network, *objective]:
                    runs[network]["/".join(["loss", *objective])] = number
                case ["learning_rate" | "gradient_norm" | "effective_rank" as kind, network]:
                    runs[network][f"training/{kind}"] = number
                case ["accuracy", network, group]:
                    runs[network][f"accuracy/{group}"] = number
                case _:
                    runs[""][name] = number
        for network, tagged in runs.items():
            with self._run(network) as run:
                for tag, number in tagged.items():
                    run.add_scalar(tag, number, step)

    def accuracy(self, step: int, *, network: str, split: str, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Writes `{"5way_1shot": {"mean", "ci95"}}` as a chart per key, and its 95 % interval as charts and a band.

        The chart of `known_classes` is `accuracy/<split>_known_classes`, and others are `few_shot/<split>_5way_1shot`.

        The bands are on TensorBoard's Custom Scalars page, one chart per key.
        """
        charts = {}
        with self._run(network) as run:
            for key, score in scores.items():
                group = "few_shot" if key.endswith("shot") else "accuracy"
                mean, interval = f"{group}/{split}_{key}", f"{group}_ci95/{split}_{key}"
                run.add_scalar(mean, score["mean"], step)
                run.add_scalar(f"{interval}_low", score["mean"] - score["ci95"], step)
                run.add_scalar(f"{interval}_high", score["mean"] + score["ci95"], step)
                charts[f"{split} {key}"] = ["Margin", [mean, f"{interval}_low", f"{interval}_high"]]
            if network not in self._banded:  # TensorBoard reads the layout once
                self._banded.add(network)
                run.add_custom_scalars({"accuracy with 95 % interval": charts})

    def show(self, step: int, tag: str, content: str | NDArray[np.uint8], *, network: str = "") -> None:
        """Writes Markdown, such as the table of the summary, or an RGB image HWC, to the run of a network."""
        with self._run(network) as run:
            if isinstance(content, str):
                run.add_text(tag, content, step)
            else:
                run.add_image(tag, content, step, dataformats="HWC")

    def hparams(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Writes the settings of a run, nested or not, and its figures to the page HParams, which compares runs."""
        flat: dict[str, str | float | bool] = {}
        waiting: list[tuple[str, Any]] = list(settings.items())
        while waiting:
            key, value = waiting.pop(0)
            if isinstance(value, dict | list):
                parts = value.items() if isinstance(value, dict) else enumerate(value)
                waiting += [(f"{key}.{name}", part) for name, part in parts]
            elif value is not None:
                flat[key] = value
        with self._run("") as run:
            for summary in hparams(flat, dict(figures)):
                run._get_file_writer().add_summary(summary)  # noqa: SLF001 (`add_hparams` makes a run of its own)
            for name, figure in figures.items():
                run.add_scalar(name, figure, 0)

    def quarantine(self, step: int, quarantine: Quarantine) -> None:
        """Writes the number of quarantined samples, in total and by stage, and a table of the first items."""
        counts = {f"quarantine/{stage}": count for stage, count in quarantine.counts.items()}
        self.write(step, {"quarantine/samples": quarantine.count, **counts})
        self.show(step, "quarantine", quarantine.markdown())

    def close(self) -> None:
        """Closes the files."""
        with write_errors(self._folder):
            for writer in self._writers.values():
                writer.close()

    @contextmanager
    def _run(self, network: str) -> Iterator[SummaryWriter]:
        """The writer of a network, or of the stage for ""; flushes it after the body."""
        with write_errors(self._folder):
            if network not in self._writers:
                folder = self._folder / network
                self._writers[network] = SummaryWriter(str(folder), purge_step=self._start_step + 1)
            yield self._writers[network]
            self._writers[network].flush()


def _print_unless_writer(failed: threading.ExceptHookArgs) -> None:
    """Prints the traceback of a failed thread, except one that writes event files: its next use raises the error."""
    if not isinstance(failed.thread, _AsyncWriterThread):
        threading.__excepthook__(failed)
