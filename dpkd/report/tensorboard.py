"""What TensorBoard shows of a stage: one TensorBoard run a network, so that networks share their charts.

<folder>/              what the stage has once: speed, quarantine, the summary text
<folder>/<network>/    losses, learning rate, gradient norm, few-shot accuracy and panels of one network
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dpkd.io.errors import write_errors
from dpkd.report.panels import panel
from dpkd.report.quarantine import Quarantine

PER_NETWORK = frozenset({"loss", "learning_rate", "gradient_norm"})
"""Groups of tags whose second part names a network: `loss/<network>/<objective>`, `learning_rate/<network>`."""
PANEL = "panel/image_priors_predictions_attention"


class Board:
    """Writes the TensorBoard files of one stage, on rank 0 alone.

    `start_step` is the step that training goes on from: what an interrupted run had written beyond it is struck out.
    Every verb raises `UserError` where the disk takes no more.
    """

    def __init__(self, folder: Path | str, *, start_step: int = 0) -> None:
        threading.excepthook = _without_writers
        self._folder = Path(folder)
        self._start_step = start_step
        self._writers: dict[str, SummaryWriter] = {}
        self._bands: dict[str, dict[str, Any]] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by tag, `<group>/<rest>`; those of a network go to its own run."""
        with write_errors(self._folder):
            for key, value in values.items():
                network, tag = _network_and_tag(key)
                self._writer(network).add_scalar(tag, value, step)
            self._flush()

    def few_shot(self, step: int, *, network: str, split: str, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Writes `{"5way_1shot": {"mean", "ci95"}}` as a chart, its 95 % interval beside it and as a band.

        The band stands on TensorBoard's Custom Scalars page, one chart for each number of shots.
        """
        with write_errors(self._folder):
            writer = self._writer(network)
            charts = self._bands.setdefault(network, {})
            known = len(charts)
            for key, score in scores.items():
                mean = f"few_shot/{split}_{key}"
                low, high = (f"uncertainty/{split}_{key}_{end}" for end in ("low", "high"))
                writer.add_scalar(mean, score["mean"], step)
                writer.add_scalar(low, score["mean"] - score["ci95"], step)
                writer.add_scalar(high, score["mean"] + score["ci95"], step)
                charts[f"{split} {key}"] = ["Margin", [mean, low, high]]
            if len(charts) > known:
                writer.add_custom_scalars({"few-shot accuracy with 95 % interval": charts})
            self._flush()

    def panel(
        self,
        step: int,
        *,
        network: str,
        image_BCHW: Tensor,
        priors: Mapping[str, Tensor],
        predictions: Mapping[str, Tensor],
        attention_B1HW: Tensor | None = None,
    ) -> None:
        """Draws uint8 images with their prior maps, the network's predictions of them and its attention."""
        picture = panel(
            image_BCHW.cpu().numpy(),
            priors={name: _array(each) for name, each in priors.items()},
            predictions={name: _array(each) for name, each in predictions.items()},
            attention_B1HW=None if attention_B1HW is None else _array(attention_B1HW),
        )
        with write_errors(self._folder):
            self._writer(network).add_image(PANEL, picture, step, dataformats="HWC")
            self._flush()

    def text(self, step: int, *, tag: str, markdown: str) -> None:
        """Shows text, such as the table of the summary."""
        with write_errors(self._folder):
            self._writer("").add_text(tag, markdown, step)
            self._flush()

    def quarantine(self, step: int, quarantine: Quarantine) -> None:
        """Writes how many samples were quarantined, in all and by the stage that did it, and names the first."""
        counts = {f"quarantine/{stage}": count for stage, count in quarantine.counts.items()}
        self.scalars(step, {"quarantine/samples": quarantine.count, **counts})
        self.text(step, tag="quarantine", markdown=quarantine.markdown())

    def close(self) -> None:
        """Closes the files."""
        with write_errors(self._folder):
            for writer in self._writers.values():
                writer.close()

    def _writer(self, network: str) -> SummaryWriter:
        if network not in self._writers:
            folder = self._folder / network
            self._writers[network] = SummaryWriter(str(folder), purge_step=self._start_step + 1)
        return self._writers[network]

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()


def _without_writers(failed: threading.ExceptHookArgs) -> None:
    """Prints no traceback for a thread that writes event files: the writer raises its error at the next use."""
    if not isinstance(failed.thread, _AsyncWriterThread):
        threading.__excepthook__(failed)


def _network_and_tag(key: str) -> tuple[str, str]:
    group, _, rest = key.partition("/")
    if group not in PER_NETWORK:
        return "", key
    if group != "loss":
        return rest, f"training/{group}"
    network, _, objective = rest.rpartition("/")
    return network, f"loss/{objective}"


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array
