"""What a run takes on this machine: parameters, steps, time, memory and disk, by a short measurement."""

import math
import re
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from dpkd.backends.local_workers import node_resources
from dpkd.data.image_headers import BrokenImage
from dpkd.data.images import decode_image
from dpkd.data.settings import GLOBAL
from dpkd.engine.settings import EngineSettings
from dpkd.log import duration, logger
from dpkd.models.network import Network, build_network
from dpkd.objectives.base import Objective, teacher_of
from dpkd.priors.base import BatchExtractor, ImageViews
from dpkd.priors.catalogue.regions import Expert
from dpkd.priors.record import store_map
from dpkd.report.figures import count_words
from dpkd.settings import DistillSettings, Settings
from dpkd.stages.check_networks import MAX_PARAMETERS
from dpkd.stages.plan import training_stages

NUM_IMAGES = 4
LONG_S = 0.3
"""A measurement that takes longer is not repeated with more images."""
GB = 1e9


class Cost(NamedTuple):
    """The parameters of a network, and what one image costs it; the times are nan if it is too large to measure."""

    parameters: int
    train_s: float
    predict_s: float
    saved_bytes: int
    """Memory for the backward pass."""


class Need(NamedTuple):
    """What a training stage takes; the memory is that of one rank, without the libraries."""

    parameters: int
    steps: int
    seconds: float
    memory_bytes: float
    disk_bytes: float


def measure_network(network: Network) -> Cost:
    """Trains the network on a few random images, with the threads of this process, on a GPU if there is one."""
    parameters, size = sum(parameter.numel() for parameter in network.parameters()), network.spec.image_size
    on_meta = next(network.parameters()).device.type == "meta"
    if on_meta and parameters <= MAX_PARAMETERS:  # of a stage that is done
        extra, network = network.extra, build_network(network.spec, seed=0)
        network.extra, on_meta = extra, False
    device = torch.device("meta" if on_meta else "cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).train()
    own, saved = {parameter.data_ptr() for parameter in network.parameters()}, dict[int, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        key = id(tensor) if on_meta else tensor.untyped_storage().data_ptr()
        if on_meta or key not in own:
            saved[key] = tensor.untyped_storage().nbytes()
        return tensor

    predict_s = train_s = math.nan if on_meta else 0.0
    # the first turn chooses kernels; a small network needs more images, or its calls count
    for turn in range(1 if on_meta else 3):
        num_images = 8 * NUM_IMAGES if turn and train_s * NUM_IMAGES < LONG_S else NUM_IMAGES
        inputs = torch.rand(num_images, 3, size, size, device=device), torch.rand(num_images, 1, 16, 16, device=device)
        began = time.perf_counter()
        saved.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = network(*inputs)
        predicted = time.perf_counter()
        sum(output.float().mean() for output in outputs.values()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not on_meta:
            predict_s, train_s = (predicted - began) / num_images, (time.perf_counter() - began) / num_images
    return Cost(parameters, train_s, predict_s, sum(saved.values()) // num_images)


def training_needs(settings: Settings, networks: Mapping[str, Network], *, num_samples: int) -> dict[str, Need]:
    """The needs of each training stage by its name; `networks` are all networks by their key in the settings."""
    costs, gpus = {key: measure_network(network) for key, network in networks.items()}, node_resources().gpus
    ranks = settings.launcher.workers or max(1, gpus)
    frozen = {f"teachers.{name}" for name, teacher in settings.teachers.items() if teacher.during_distill == "frozen"}
    needs = {}
    for stage, (kind, name, key, part) in training_stages(settings).items():
        training, learners = part.training, dict[str, Sequence[Objective]]()
        if isinstance(part, DistillSettings):
            learners = {key: each.objectives for key, each in settings.networks.items() if key not in frozen}
        else:
            student = name.partition(".x")[0]
            learners = {key if kind == "teach" else f"distill.students.{student}": part.objectives}
        steps, rank_images = training.num_steps(num_samples), training.micro_batch_size or training.batch_size // ranks
        followed: dict[str, float] = {}
        image_s = memory = saved = disk = 0.0
        for learner, objectives in learners.items():
            cost, passes, engine = costs[learner], _passes(settings, objectives), settings.networks[learner].engine
            image_s += cost.train_s * passes
            memory += cost.parameters * bytes_of_parameter(engine, ranks=ranks, gpus=gpus)
            saved = max(saved, cost.saved_bytes * passes * rank_images)  # one network after the other
            disk += cost.parameters * (training.keep_checkpoints * (12 + 4 * (engine.ema is not None)) + 4)
            for objective in objectives:
                if objective.needs().teacher:
                    teacher = f"teachers.{teacher_of(objective) or next(iter(settings.teachers))}"
                    followed[teacher] = max(followed.get(teacher, 0.0), _passes(settings, [objective]))
        for teacher in followed.keys() - learners.keys():
            image_s += costs[teacher].predict_s * followed[teacher]
            memory += 4 * costs[teacher].parameters
        seconds = image_s * steps * training.batch_size / (ranks if gpus else 1)  # on a CPU ranks share the cores
        needs[stage] = Need(sum(costs[each].parameters for each in learners), steps, seconds, memory + saved, disk)
    return needs


def _passes(settings: Settings, objectives: Sequence[Objective]) -> float:
    """Forward passes of a network for one image, in those of the first global view."""
    needs, data = [objective.needs() for objective in objectives], settings.data
    views = [data.views[name] for name in {GLOBAL}.union(*(need.views for need in needs))]
    derived = {view.name: view.share for need in needs for view in need.derived}
    return sum(derived.values()) + sum(
        view.count * ((view.size or data.image_size) / data.image_size) ** 2 for view in views
    )


def bytes_of_parameter(engine: EngineSettings, *, ranks: int, gpus: int) -> float:
    """Memory of a rank for a trained fp32 weight with its average, its gradient, and the two moments of AdamW."""
    stage = engine.zero_stage if engine.kind == "deepspeed" or (engine.kind == "auto" and gpus > 1) else 0
    parts = ((4 + 4 * (engine.ema is not None), 3), (4, 2), (8, 1))
    return sum(size / (ranks if stage >= first else 1) for size, first in parts)


def measure_priors(settings: Settings, images: Sequence[bytes]) -> tuple[float, float]:
    """Seconds and bytes of the prior maps of one image, without those of an expert and of models."""
    priors = [prior for prior in settings.prepare.chosen if not isinstance(prior, Expert | BatchExtractor)]
    seconds, num_bytes = 0.0, 0
    for number, image in enumerate(images):
        began, maps = time.perf_counter(), []
        with suppress(BrokenImage):
            views = ImageViews(decode_image(image, window=settings.data.window))
            maps = [store_map(prior, prior.map(views)) for prior in priors]
        if number:  # the first time compiles
            seconds += time.perf_counter() - began
            num_bytes += sum(len(stored.data) for stored in maps)
    return seconds / max(1, len(images) - 1), num_bytes / max(1, len(images) - 1)


def log_needs(
    settings: Settings,
    left: Collection[str],
    networks: Mapping[str, Network],
    *,
    images: Sequence[bytes],
    num_images: int,
    num_training: int,
    to_pack_bytes: int,
) -> None:
    """Logs what the stages that are left take, and what does not fit; `images` are a few of `num_images`."""
    needs = training_needs(settings, networks, num_samples=num_training)
    needs = {stage: need for stage, need in needs.items() if stage in left}
    disk = to_pack_bytes + sum(need.disk_bytes for need in needs.values())
    logger.info("measured here on a few images, without evaluation:")
    if "prepare" in left:
        image_s, map_bytes = measure_priors(settings, images)
        disk += num_images * map_bytes
        seconds = num_images * image_s / (settings.launcher.pool_workers or node_resources().cpus)
        logger.info(
            f"  prepare: {num_images:,} images, {num_images * map_bytes / GB:.2f} GB, about {duration(seconds)}"
        )
    ranks, free = settings.launcher.workers or 1, _free_memory()
    for stage, need in needs.items():
        about = "time unknown" if math.isnan(need.seconds) else f"about {duration(need.seconds)}"
        memory = need.memory_bytes * (1 if torch.cuda.is_available() else ranks)
        lacks = "" if memory <= free else f": DOES NOT FIT into {free / GB:.1f} GB, lower training.micro_batch_size"
        parameters = f"{count_words(need.parameters)} parameters, {need.steps:,} steps"
        logger.info(f"  {stage}: {parameters}, {about}, {need.memory_bytes / GB:.2f} GB of memory a rank{lacks}")
    place = Path(settings.run.dir).absolute()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free
    lacks = "" if disk <= free else ": DOES NOT FIT, free some or move run.dir"
    logger.info(f"  disk: {disk / GB:.2f} GB of {free / GB:.1f} GB that are free{lacks}")


def _free_memory() -> float:
    """Bytes that are free on the smallest GPU, or on this machine without one."""
    if torch.cuda.is_available():
        return min(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    (available,) = re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())
    return 1024.0 * int(available)
