"""What a person sees of a network while it trains: few-shot accuracy, panels, losses, and where the time goes.

Axes: N sample that can be read, D feature.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpkd.data.batch import Batch
from dpkd.data.settings import GLOBAL
from dpkd.evaluation.few_shot import Episodes, draw_episodes, few_shot_accuracy, score
from dpkd.evaluation.settings import EpisodeSettings
from dpkd.log import EventReader, Progress
from dpkd.models.attention import with_attention
from dpkd.report.goodput import StepTimer, TimeAccount
from dpkd.report.pictures import panel
from dpkd.report.summary import figure_or_none
from dpkd.report.tensorboard import Board
from dpkd.stages.embed import embed_networks
from dpkd.stages.run import Run
from dpkd.train.task import Task, network_inputs, with_view_maps

NUM_PANEL_IMAGES = 6
PANEL = "panel/image_priors_predictions_attention"


class Monitor:
    """Evaluates and draws every network of a task; the board is rank 0's, the other ranks take part without one."""

    def __init__(self, run: Run, task: Task, board: Board | None) -> None:
        self._run, self._task, self._board = run, task, board

    @cached_property
    def _settings(self) -> EpisodeSettings:
        evaluate = self._run.settings.evaluate
        assert evaluate is not None, "only due where something is evaluated"
        # centring needs a pass over the training split, which is left to the evaluation at the end
        transform = "l2" if evaluate.episodes.transform == "centred_l2" else evaluate.episodes.transform
        changes = {"episodes": evaluate.episodes_while_training, "transform": transform}
        return evaluate.episodes.model_copy(update=changes)

    @cached_property
    def _episodes(self) -> Episodes:
        name = self._run.data.val
        assert name is not None, "only due where there is a validation split"
        label_N = self._run.dataset.split(name).label_N[self._run.readable(name)]
        return draw_episodes(label_N, self._settings, seed=self._run.seed, split=name)

    def evaluate(self, step: int) -> None:
        """Few-shot accuracy of every network on the validation split."""
        run, board, name = self._run, self._board, self._run.data.val
        assert name is not None, "only due where there is a validation split"
        embedded = embed_networks(run, self._task.learners, run.dataset.split(name), indices=run.readable(name))
        if board is None:
            return
        for network, outputs in embedded.items():
            accuracy = few_shot_accuracy(outputs["embedding"], self._episodes, settings=self._settings)
            scores = {key: score(accuracy_E) for key, accuracy_E in accuracy.items()}
            board.few_shot(step, network=network, split=name, scores=scores)
            means = {key: round(table["mean"], 4) for key, table in scores.items()}
            run.events.write("few_shot", network=network, step=step, split=name, **means)

    def panels(self, step: int, batch: Batch) -> None:
        """Image, priors, the network's predictions of them and its attention, side by side."""
        view = with_view_maps(batch.first(NUM_PANEL_IMAGES), self._task.maps).views[GLOBAL]
        for name, learner in self._task.learners.items():
            inputs = network_inputs(learner.spec, view)
            outputs = with_attention(learner.network.backbone, partial(learner.engine.predict, *inputs))
            if self._board is None:
                continue
            predictions = {}
            for key, output in outputs.items():
                if key.startswith("prior/"):
                    predictions[key.removeprefix("prior/")] = _array(output)
            for key, output in outputs.items():
                if key.startswith("region/"):
                    predictions[key.replace("/", " of ")] = _array(output.sigmoid())
            drawing = partial(
                panel,
                view.image_BCHW.cpu().numpy(),
                priors={key: _array(map_BCHW) for key, map_BCHW in view.maps.items()},
                predictions=predictions,
                attention_B1HW=_array(outputs["attention"]),
            )
            picture = figure_or_none(f"panel of {name}", drawing)
            if picture is not None:
                self._board.show(step, PANEL, picture, network=name)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array


class EventSink:
    """Losses, rates and speeds as lines of `events.jsonl`."""

    def __init__(self, run: Run, *, stage: str) -> None:
        self._events, self._stage = run.events, stage

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Appends one line."""
        self._events.write("train", stage=self._stage, step=step, **numbers)


class ProgressSink:
    """Moves the progress line on, with images/s and the sum of each network's losses."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers of this step."""
        losses: dict[str, float] = defaultdict(float)
        for key, value in numbers.items():
            if key.startswith("loss/"):
                losses[key.split("/")[1]] += value
        words = ", ".join(f"{network} {loss:.3f}" for network, loss in losses.items())
        self._progress.reach(step, note=f"{numbers['speed/images_per_s']:,.0f} images/s, loss {words}")


def step_timer(run: Run, board: Board, *, stage: str) -> StepTimer:
    """A timer that writes to `events.jsonl`; TensorBoard shows the shares of the whole run so far."""
    reader, account = EventReader(run.folder.events), TimeAccount()

    def write(kind: str, *, step: int, **numbers: float | bool) -> None:
        run.events.write(kind, stage=stage, step=step, **numbers)
        account.add(reader.new())
        if kind == "spent":
            shares = {f"goodput/{name}": share for name, share in account.shares.items()}
            board.write(step, shares | {"goodput/step_goodput": account.step_goodput})

    return StepTimer(write)
