"""Reports during training: few-shot accuracy, panels, losses, and goodput.

Axes: N readable sample, D feature.
"""

from collections import defaultdict
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpkd.data.batch import Batch
from dpkd.data.labels import Labels
from dpkd.data.settings import GLOBAL
from dpkd.evaluation.few_shot import Episodes, draw_episodes, few_shot_accuracy
from dpkd.evaluation.long_tail import known_hits, long_tail
from dpkd.evaluation.rank import COLLAPSED, effective_rank
from dpkd.evaluation.settings import EpisodeSettings
from dpkd.log import EventReader, Progress, logger
from dpkd.models.attention import with_attention
from dpkd.report.figures import KNOWN
from dpkd.report.goodput import TimeAccount
from dpkd.report.pictures import panel
from dpkd.report.quarantine import Quarantine
from dpkd.report.summary import figure_or_none, speed_words
from dpkd.report.tensorboard import Board
from dpkd.stages.classify import Values, figure_score, measure_several, predictions_of
from dpkd.stages.networks import embed_networks
from dpkd.stages.run import Run
from dpkd.train.task import Task, network_inputs, with_view_maps

NUM_PANEL_IMAGES = 6
PANEL = "panel/image_priors_predictions_attention"


class Monitor:
    """Evaluates and draws every network of a task on all ranks; rank 0 writes TensorBoard, events and progress."""

    def __init__(self, run: Run, task: Task, *, stage: str, start_step: int, progress: Progress) -> None:
        self._run, self._task, self._stage, self._progress = run, task, stage, progress
        self._writes = run.world.rank == 0
        self._reader, self._account = EventReader(run.folder.events), TimeAccount()
        self._board = Board(run.folder.tensorboard / stage, start_step=start_step)
        if self._writes:
            self._board.quarantine(start_step, Quarantine(run.folder.quarantine, limit=1.0))

    def close(self) -> None:
        """Closes the files."""
        self._board.close()

    def report(self, kind: str, *, step: int, **numbers: float) -> None:
        """Writes a report of a `Meter`; the progress line shows the speed and the sum of each network's losses.

        TensorBoard also shows the time of the whole run by category.
        """
        self._run.folder.write_event(kind, stage=self._stage, step=step, **numbers)
        self._account.add(self._reader.new())
        if kind == "train":
            self._board.write(step, numbers)
            losses: dict[str, float] = defaultdict(float)
            for key, value in numbers.items():
                if key.startswith("loss/"):
                    losses[key.split("/")[1]] += value
            words = ", ".join(f"{network} {loss:.3f}" for network, loss in losses.items())
            self._progress.reach(step, note=f"{speed_words(numbers)}, loss {words}")
        elif kind == "spent":
            shares = {f"goodput/{name}": share for name, share in self._account.shares.items()}
            self._board.write(step, shares | {"goodput/step_goodput": self._account.step_goodput})

    @cached_property
    def _labels(self) -> Labels:
        """The labels of the readable samples of the validation split."""
        name = str(self._run.data.val)
        return np.delete(self._run.dataset.split(name).label_N, self._run.unreadable(name)).astype(np.int64)

    @cached_property
    def _protocol(self) -> tuple[EpisodeSettings, Episodes] | None:
        """The episodes from the validation split, fewer than those of the evaluation at the end."""
        run, evaluate, name = self._run, self._run.settings.evaluate, self._run.data.val
        assert evaluate is not None and name is not None, "only due if something is evaluated"  # noqa: PT018
        if evaluate.episodes is None:
            return None
        # centring needs a pass over the training split, which only the evaluation at the end makes
        transform = "l2" if evaluate.episodes.transform == "centred_l2" else evaluate.episodes.transform
        changes = {"episodes": evaluate.episodes_while_training, "transform": transform}
        settings = evaluate.episodes.model_copy(update=changes)
        return settings, draw_episodes(self._labels, settings, seed=run.seed, split=name)

    def evaluate(self, step: int) -> None:
        """Writes the accuracy and effective rank of every network on the validation split."""
        run, name = self._run, str(self._run.data.val)
        split, several = run.dataset.split(name), run.dataset.split(name).info.multi_label
        embedded = embed_networks(run, self._task.learners, split, indices=run.readable(name))
        if not self._writes:
            return
        values: dict[str, Values] = {network: {} for network in embedded}
        if several:
            values |= measure_several(run, split, embedded)[0]
        elif self._protocol is not None:
            settings, episodes = self._protocol
            for network, outputs in embedded.items():
                values[network] = few_shot_accuracy(outputs["embedding"], episodes, settings=settings)
        specs = {network: learner.spec for network, learner in self._task.learners.items()}
        for network, prediction_N in () if several else predictions_of(run, specs, embedded, self._labels).items():
            values[network][KNOWN] = known_hits(prediction_N, self._labels)
            groups = long_tail(prediction_N, self._labels, train_count_K=run.train_counts)
            self._board.write(step, {f"accuracy/{network}/{name}_{key}": groups[key] for key in groups})
        for network, outputs in embedded.items():
            scores = {key: figure_score(key, value) for key, value in values[network].items()}
            self._board.accuracy(step, network=network, split=name, scores=scores)
            facts = {"stage": self._stage, "step": step, "network": network, "split": name, "scores": scores}
            run.folder.write_event("evaluated", **facts)
            rank = effective_rank(outputs["embedding"])
            self._board.write(step, {f"effective_rank/{network}": rank})
            if rank < COLLAPSED:
                logger.info(
                    f"{self._stage}, step {step}: the embeddings of {network} on {name} have an effective rank of "
                    f"{rank:.2f} of {outputs['embedding'].shape[1]}: they collapse; lower its learning rate"
                )

    def panels(self, step: int, batch: Batch) -> None:
        """Draws images, priors, and each network's predictions and attention."""
        view = with_view_maps(batch.first(NUM_PANEL_IMAGES), self._task.maps).views[GLOBAL]
        for name, learner in self._task.learners.items():
            inputs = network_inputs(learner.spec, view)
            outputs = with_attention(learner.network.backbone, partial(learner.engine.predict, *inputs))
            if not self._writes:
                continue
            priors = {key.removeprefix("prior/"): _array(outputs[key]) for key in outputs if key.startswith("prior/")}
            if "segmentation" in outputs:
                priors["segmentation"] = _array(outputs["segmentation"].softmax(1))
            regions = {
                key.replace("/", " of "): _array(outputs[key].sigmoid()) for key in outputs if key.startswith("region/")
            }
            drawing = partial(
                panel,
                view.image_BCHW.cpu().numpy(),
                priors={key: _array(map_BCHW) for key, map_BCHW in view.maps.items()},
                predictions=priors | regions,
                attention_B1HW=_array(outputs["attention"]),
            )
            picture = figure_or_none(f"panel of {name}", drawing)
            if picture is not None:
                self._board.show(step, PANEL, picture, network=name)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array
