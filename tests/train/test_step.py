"""One step of several networks: its memory, and the inputs that they share."""

from argparse import Namespace
from itertools import repeat

import torch

from dpkd.data.batch import Batch, View
from dpkd.engine.network import InPrecision, cast_layers, is_convolutional
from dpkd.engine.settings import EngineSettings
from dpkd.engine.world import World
from dpkd.models.network import Network, build_network
from dpkd.models.settings import FigureGroundPooling, ModelSettings, NetworkSpec
from dpkd.objectives.logits import LogitDistillation
from dpkd.objectives.supervised import Supervised
from dpkd.train.loop import Plan, train_step
from dpkd.train.meter import Meter
from dpkd.train.task import network_inputs
from tools.bench_step import _task, peak_bytes

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
CPU = torch.device("cpu")


def network(name: str, *, mean: float = 0.5) -> Network:
    model, classes = ModelSettings(name=name), tuple(map(str, range(100)))
    return build_network(
        NetworkSpec(model=model, classes=classes, image_size=64, mean=(mean,) * 3, std=(0.2,) * 3), seed=0
    )


def batch() -> Batch:
    image_BCHW = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch({"global": View(image_BCHW)}, {"class": torch.arange(8)}, torch.arange(8), torch.zeros(8))


def peak(*names: str) -> int:
    objectives, settings = (Supervised(), LogitDistillation()), EngineSettings(kind="torch")
    students = {f"{place}": (network(name), objectives, settings) for place, name in enumerate(names)}
    task = _task(students, Namespace(batch=8, precision="fp32"), ALONE, teacher=network("resnet18"))
    plan, meter = Plan(10**9, 1, 10**9, 10**9, None, None), Meter(world=ALONE, images_per_step=8)
    return peak_bytes(lambda: train_step(task, repeat(batch()), step=0, plan=plan, meter=meter))


def test_several_students_take_no_more_memory_in_a_step_than_the_largest_alone() -> None:
    names = ("resnet18", "mobilenetv3_small_050", "resnet18", "resnet10t")
    assert peak(*names) <= 1.02 * max(peak(name) for name in set(names))


def test_networks_of_one_normalisation_share_their_input_and_others_have_their_own() -> None:
    view = batch().views["global"]
    one, same, other = (network("test_resnet", mean=mean).spec for mean in (0.5, 0.5, 0.4))
    (first,), (second,), (third,) = (network_inputs(spec, view) for spec in (one, same, other))
    assert first is second
    torch.testing.assert_close(third, (view.image_BCHW / 255 - 0.4) / 0.2)


def test_the_control_of_pooling_weighs_patches_by_the_map_of_another_image() -> None:
    view = View(batch().views["global"].image_BCHW, {"saliency": torch.rand(8, 1, 4, 4)})
    spec = network("test_resnet").spec
    own, shuffled = (
        spec.model_copy(
            update={"model": spec.model.model_copy(update={"pooling": FigureGroundPooling(control=control)})}
        )
        for control in ("none", "shuffle")
    )
    (image, weight), (same_image, other) = network_inputs(own, view), network_inputs(shuffled, view)
    assert image is same_image
    torch.testing.assert_close(weight, view.maps["saliency"])
    torch.testing.assert_close(other[3], weight[2])


def test_a_frozen_network_of_layers_in_bf16_has_the_outputs_of_autocast() -> None:
    for name in (
        "resnet18",
        "mobilenetv3_small_050",
        "vit_tiny_patch16_224",
        "convnext_atto",
        "nf_regnet_b0",
        "beit_base_patch16_224",
    ):
        frozen = network(name).eval()
        runner = InPrecision(frozen, device=CPU, precision="bf16")
        image_BCHW = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            expected = runner(image_BCHW)
            cast_layers(frozen)
            found = runner(image_BCHW)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        assert all(output.dtype == torch.float32 for output in found.values())


def test_only_networks_of_convolutions_take_channels_last() -> None:
    kinds = {"resnet18": True, "convnext_atto": True, "vit_tiny_patch16_224": False, "beit_base_patch16_224": False}
    assert {name: is_convolutional(network(name)) for name in kinds} == kinds
