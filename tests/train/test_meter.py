"""The speed of training: FLOPs of a step counted by hand, and their share of a peak."""

from typing import Any

import pytest
import torch

from dpkd.data.settings import AugmentSettings
from dpkd.data.stream import ViewPlan
from dpkd.engine.network import Frozen
from dpkd.engine.peak import PEAK_TFLOPS, peak_tflops
from dpkd.engine.world import World
from dpkd.models.counts import count_flops
from dpkd.models.network import Network
from dpkd.models.settings import HeadSpec, ModelSettings, NetworkSpec
from dpkd.objectives.base import Supervision
from dpkd.objectives.logits import LogitDistillation
from dpkd.objectives.masked_prior import MaskedPrior
from dpkd.train.meter import Meter
from dpkd.train.task import Learner, Task


def network(name: str, **heads: int) -> Network:
    spec = NetworkSpec(
        model=ModelSettings(name=name),
        classes=("a", "b"),
        image_size=64,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        heads={f"prior/{head}": HeadSpec(reads="patch", width=width) for head, width in heads.items()},
    )
    return Network(spec)


def test_a_step_has_three_passes_of_each_student_also_of_hidden_views_and_one_of_the_teacher() -> None:
    teacher, student = network("test_resnet"), network("resnet18", hog=9)
    objectives = (LogitDistillation(), MaskedPrior(mask_ratio=0.4))
    learner = Learner(engine=None, network=student, objectives=objectives, rate=lambda _: 1e-3)  # type: ignore[arg-type]
    supervision = Supervision(("a", "b"), 1.0, torch.zeros(2))
    task = Task(
        {"student": learner}, teachers={"teacher": Frozen(teacher.spec, teacher)}, supervision=supervision, seed=0
    )
    plans = {
        "global": ViewPlan(64, 16, AugmentSettings(), count=2),
        "local": ViewPlan(32, 8, AugmentSettings(), count=6),
    }
    once = {"teacher": count_flops(teacher.spec), "student": count_flops(student.spec)}
    assert task.flops_per_image(plans) == 2 * once["teacher"] + 3 * (2 + 1) * once["student"]


@pytest.mark.parametrize("peak", [None, 0.5])
def test_a_log_line_has_the_speed_of_one_device_and_its_share_of_the_peak(peak: float | None) -> None:
    lines: list[dict[str, Any]] = []
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    meter = Meter(
        world=world,
        images_per_step=32,
        report=lambda kind, **numbers: lines.append(numbers),
        flops_per_image=lambda: 3 * 10**9,
        peak_tflops=peak,
    )
    meter.add_norm("student", torch.tensor(1.0), step=0, learning_rate=0.1)
    meter.settle(1, log=True)
    (line,) = lines
    assert line["speed/tflops"] == pytest.approx(line["speed/images_per_s"] * 3e-3)
    assert line.get("speed/mfu") == (None if peak is None else pytest.approx(line["speed/tflops"] / peak))


def test_a_line_of_a_network_that_cannot_be_counted_has_images_per_second_alone() -> None:
    lines: list[dict[str, Any]] = []
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    meter = Meter(
        world=world, images_per_step=32, report=lambda kind, **numbers: lines.append(numbers), peak_tflops=1.0
    )
    meter.add_norm("student", torch.tensor(1.0), step=0, learning_rate=0.1)
    meter.settle(1, log=True)
    assert {key for key in lines[0] if key.startswith("speed/")} == {"speed/images_per_s", "speed/data_wait"}


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA GeForce GTX 1080", "bf16", None),
    ],
)
def test_a_gpu_is_found_by_its_name(
    name: str, precision: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_tflops(torch.device("cuda", 0), precision=precision) == tflops
    assert peak_tflops(torch.device("cpu"), precision=precision) is None
    assert all(bf16 >= tf32 for bf16, tf32 in PEAK_TFLOPS.values())
