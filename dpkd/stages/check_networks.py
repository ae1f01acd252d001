"""Builds every network of a run once, before any work: its arguments, weights, heads, pooling and export."""

import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from dpkd.engine.network import prepare
from dpkd.engine.world import World
from dpkd.errors import UserError
from dpkd.models.backbone import LayerMix
from dpkd.models.network import Network, build_network
from dpkd.models.parameters import parameter_groups
from dpkd.models.published import fetch_weights
from dpkd.models.settings import NetworkSpec
from dpkd.models.weights import load_weights
from dpkd.objectives.base import teacher_of
from dpkd.objectives.mixup import Mixup
from dpkd.priors.base import BatchExtractor, ImageViews
from dpkd.priors.derived import derivable
from dpkd.settings import NetworkSettings, Settings, StudentSettings
from dpkd.stages.export import write_timm_folder
from dpkd.stages.networks import network_spec, untrained_spec
from dpkd.stages.plan import first_stage

CLASSES = ("a", "b")
"""Class names of the built networks: the number of classes is not known before packing."""
MAX_PARAMETERS = 100_000_000
"""A network with more parameters is built without memory, so that nothing of it is computed."""


def check_networks(settings: Settings, stages: Collection[str]) -> dict[str, Network]:
    """All networks by their key in the settings; those of the stages are checked, others have no memory.

    For the stage prepare it loads learned priors, too.

    Raises `UserError` with the key of a network that cannot be built, trained or exported, or does not run on the
    images.
    """
    if "prepare" in stages:
        grey = ImageViews(torch.full((64, 64, 3), 128, dtype=torch.uint8).numpy())
        for prior in settings.prepare.chosen:
            if isinstance(prior, BatchExtractor):
                prior.maps([grey], device="cpu")
    outputs, sizes = _asked(settings)
    networks: dict[str, Network] = {}
    for key, network in settings.networks.items():
        due = first_stage(settings, key) in stages
        try:
            teachers = {other.removeprefix("teachers."): each for other, each in networks.items()}
            if due and network.model.pretrained:
                fetch_weights(network.model.name)
            spec = _spec(settings, network, teachers=teachers)
            built = networks[key] = _build(spec, network.weights if due else None, seeded=due)
            built.extra = frozenset(outputs[key])
            if due:
                _check(built, network, sizes=sizes[key] | {spec.image_size})
            is_exported = due and settings.export is not None and isinstance(network, StudentSettings)
            if is_exported and next(built.parameters()).device.type != "meta":
                with tempfile.TemporaryDirectory(prefix="dpkd-check-") as folder:
                    write_timm_folder(Path(folder), built.eval())  # raises if timm does not give its outputs
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    return networks


def _asked(settings: Settings) -> tuple[Mapping[str, set[str]], Mapping[str, set[int]]]:
    """By key, the outputs of each teacher that others follow, and the sides of the images that each network reads."""
    outputs: dict[str, set[str]] = defaultdict(set)
    sizes: dict[str, set[int]] = defaultdict(set)
    for key, objective in settings.objectives.items():
        needs = objective.needs()
        view_sizes = {settings.data.views[view].size or settings.data.image_size for view in needs.views}
        sizes[key.rpartition(".objectives.")[0]] |= view_sizes
        if needs.teacher:
            teacher = f"teachers.{teacher_of(objective) or next(iter(settings.teachers))}"
            outputs[teacher] |= set(needs.teacher)
            sizes[teacher] |= view_sizes
    return outputs, sizes


def _spec(settings: Settings, network: NetworkSettings, *, teachers: Mapping[str, Network]) -> NetworkSpec:
    """The spec of a network with made-up classes, without published weights."""
    network = network.model_copy(update={"model": network.model.model_copy(update={"pretrained": False})})
    if not network.objectives:
        return untrained_spec(network, image_size=settings.data.image_size)
    stored = {prior.name: prior.channels for prior in settings.prepare.chosen}
    channels = stored | dict.fromkeys(derivable(stored), 1)
    grey = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return network_spec(
        network, data=settings.data, classes=CLASSES, channels=channels, teachers=teachers, statistics=grey
    )


def _build(spec: NetworkSpec, weights: str | None, *, seeded: bool) -> Network:
    """The network with its first weights; without memory if it is large, or if it is not `seeded`."""
    try:
        with torch.device("meta"):
            network = build_network(spec)
    except UserError:  # also for a model that reads its weights while it is built: only real ones can tell
        return build_network(spec, seed=0, weights=weights)
    if seeded and sum(parameter.numel() for parameter in network.parameters()) <= MAX_PARAMETERS:
        return build_network(spec, seed=0, weights=weights)
    if weights is not None:
        load_weights(network.backbone.timm, weights)
    return network


def _check(network: Network, settings: NetworkSettings, *, sizes: Collection[int]) -> None:
    """Runs the network on images of these sizes; raises `UserError` if it cannot, and for a stage that it lacks."""
    for number, objective in enumerate(settings.objectives):
        if isinstance(objective, Mixup) and objective.stages:
            try:
                with network.backbone.mixing([(0, LayerMix(objective.stages, torch.empty(0), torch.empty(0)))]):
                    pass
            except UserError as error:
                raise UserError(f"objectives.{number}: {error}") from error
    for output in network.extra:
        network.backbone.width(output)
    device = next(network.parameters()).device
    if settings.objectives:
        prepare(network, settings=settings.engine, world=World(rank=0, size=1, local_rank=0, device=device))
    parameter_groups(network, weight_decay=settings.optimizer.weight_decay, layer_decay=settings.optimizer.layer_decay)
    for size in sorted(sizes):
        try:
            with torch.inference_mode(), device:
                network.eval()(torch.zeros(2, 3, size, size), torch.ones(2, 1, size // 4, size // 4))
        except (RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError) as error:
            cause = (str(error).splitlines() or [""])[0][:200]
            raise UserError(
                f"model {settings.model.name!r} does not run on {size} px images, with {settings.model.pooling.kind} "
                f"pooling ({type(error).__name__}: {cause}): set data.image_size or the view's size, choose another "
                "model, or let a ViT take any size by model.arguments.dynamic_img_size=true"
            ) from error
