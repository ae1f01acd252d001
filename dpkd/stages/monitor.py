"""What is looked at while a network trains: few-shot accuracy on the validation split, panels, and where numbers go.

Axes: N sample that can be read, D feature.
"""

from collections.abc import Mapping
from functools import cached_property, partial

from dpkd.data.stream import Batch
from dpkd.evaluation.few_shot import Episodes, draw_episodes, few_shot_accuracy, score
from dpkd.evaluation.settings import EpisodeSettings
from dpkd.log import EventLog, EventReader, Progress
from dpkd.models.attention import with_attention
from dpkd.report.goodput import Books
from dpkd.report.tensorboard import Board
from dpkd.stages.embed import embed_networks
from dpkd.stages.run import Run
from dpkd.train.loop import Hooks
from dpkd.train.task import DistillTask, TeachTask, network_input, pooling_weight, with_view_maps

NUM_PANEL_IMAGES = 6


class Watch:
    """Evaluates and draws every network of a task; the board is rank 0's, the other ranks take part without one."""

    def __init__(self, run: Run, task: TeachTask | DistillTask, board: Board | None) -> None:
        self._run, self._task, self._board = run, task, board

    def hooks(self) -> Hooks:
        """What the loop calls."""
        return Hooks(evaluate=self.evaluate, panels=self.panels)

    @cached_property
    def _settings(self) -> EpisodeSettings:
        evaluate = self._run.evaluate
        # centring needs a pass over the training split, which is left to the evaluation at the end
        transform = "l2" if evaluate.episodes.transform == "centred_l2" else evaluate.episodes.transform
        return evaluate.episodes.model_copy(
            update={"episodes": evaluate.episodes_while_training, "transform": transform}
        )

    @cached_property
    def _episodes(self) -> Episodes:
        split = self._run.dataset.split(self._run.data.val)
        label_N = split.label_N[self._run.readable(split.name)]
        return draw_episodes(label_N, self._settings, seed=self._run.seed, split=split.name)

    def evaluate(self, step: int) -> None:
        """Few-shot accuracy of every network on the validation split."""
        run, learners = self._run, self._task.learners
        embedded = embed_networks(
            {name: (learner.engine.predict, learner.spec) for name, learner in learners.items()},
            run.dataset.split(run.data.val),
            maps=run.maps_of(run.data.val, self._task.maps),
            map_size=run.map_size,
            world=run.world,
            loader=run.data.loader,
            indices=run.readable(run.data.val),
        )
        if self._board is None:
            return
        for name, found in embedded.items():
            accuracy = few_shot_accuracy(found.embedding_ND, self._episodes, settings=self._settings)
            scores = {key: score(accuracy_E).table() for key, accuracy_E in accuracy.items()}
            self._board.few_shot(step, network=name, split=run.data.val, scores=scores)
            numbers = {key: round(each["mean"], 4) for key, each in scores.items()}
            run.events.write("few_shot", network=name, step=step, split=run.data.val, **numbers)

    def panels(self, step: int, batch: Batch) -> None:
        """Image, priors, the network's predictions of them and its attention, side by side."""
        few = with_view_maps(batch.first(NUM_PANEL_IMAGES), self._task.maps)
        for name, learner in self._task.learners.items():
            inputs = (network_input(learner.spec, few), pooling_weight(learner.spec, few))
            outputs = with_attention(learner.network.backbone, partial(learner.engine.predict, *inputs))
            if self._board is None:
                continue
            predictions = {
                key.removeprefix("prior."): each for key, each in outputs.items() if key.startswith("prior.")
            }
            predictions |= {
                key.replace(".", " of "): each.sigmoid() for key, each in outputs.items() if key.startswith("region.")
            }
            self._board.panel(
                step,
                network=name,
                image_BCHW=few.image_BCHW,
                priors=few.priors,
                predictions=predictions,
                attention_B1HW=outputs["attention"],
            )


class EventSink:
    """Losses and rates as lines of `events.jsonl`."""

    def __init__(self, events: EventLog, *, stage: str) -> None:
        self._events, self._stage = events, stage

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line."""
        self._events.write("train", stage=self._stage, step=step, **values)


class TimeSink:
    """What the loop spends its time on, as events; TensorBoard shows the shares of the whole run so far."""

    def __init__(self, run: Run, board: Board, *, stage: str) -> None:
        self._events, self._board, self._stage = run.events, board, stage
        self._reader, self._books = EventReader(run.folder.events), Books()

    def tell(self, kind: str, *, step: int, **numbers: float | bool) -> None:
        """Writes one event, and draws where time was spent."""
        self._events.write(kind, stage=self._stage, step=step, **numbers)
        for event in self._reader.new():
            self._books.add(event)
        if kind == "spent":
            account = self._books.account()
            shares = {f"goodput/{name}": share for name, share in account.shares.items()}
            self._board.scalars(step, shares | {"goodput/of_steps": account.step_goodput})


class ProgressSink:
    """Moves the progress line on, with the sum of each network's losses."""

    def __init__(self, progress: Progress, *, start_step: int) -> None:
        self._progress, self._done = progress, start_step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the losses of this step."""
        losses: dict[str, float] = {}
        for key, value in values.items():
            if key.startswith("loss/"):
                name = key.split("/")[1]
                losses[name] = losses.get(name, 0.0) + value
        rate = values["speed/images_per_s"]
        self._progress.note(
            f"{rate:,.0f} images/s, loss " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        )
        self._progress.advance(step - self._done)
        self._done = step
