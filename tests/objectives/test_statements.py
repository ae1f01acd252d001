"""The losses of experts' statements: weighted as asked, each bound on the samples it names, the same at any cut."""

import pytest
import torch

from dpkd.data.attributes import score_weights
from dpkd.data.batch import Batch, View
from dpkd.objectives.attributes import Attributes, predict_attributes
from dpkd.objectives.base import ClassAttributes, Context, Objective, Supervision, losses_of
from dpkd.objectives.region_bounds import Bound, RegionBounds, fit_region
from dpkd.objectives.supervised import supervised

VALUE_KA = torch.tensor([[0.0, 1.0, float("nan")], [0.5, 0.2, 1.0]])
WEIGHT_KA, BIAS_K = (torch.from_numpy(array) for array in score_weights(VALUE_KA.numpy()))
LABEL_B = torch.tensor([0, 1, -1, 1, -1, 0, 1, 1])
TABLE = ClassAttributes(VALUE_KA, WEIGHT_KA, BIAS_K)


def context_of(*, label_B: torch.Tensor = LABEL_B, cut: slice = slice(None), share: float = 0.75) -> Context:
    generator = torch.Generator().manual_seed(0)
    saliency_B1HW = torch.rand(8, 1, 8, 8, generator=generator)
    image_BCHW = torch.randint(0, 256, (8, 3, 16, 16), generator=generator).to(torch.uint8)
    generator = torch.Generator().manual_seed(1)
    outputs = {
        "attributes": torch.randn(8, 3, generator=generator),
        "region/saliency": torch.randn(8, 1, 4, 4, generator=generator),
    }
    index_B = torch.arange(8)
    view = View(image_BCHW[cut], {"saliency": saliency_B1HW[cut]})
    batch = Batch({"global": view}, {"class": label_B[cut]}, index_B[cut], torch.zeros(8)[cut])
    supervision = Supervision(("cat", "owl"), share, torch.zeros(2), TABLE)
    seen = {key: output[cut] for key, output in outputs.items()}
    return Context(batch, {"global": seen}, {}, supervision, step=0, seed=0)


OBJECTIVES: tuple[Objective, ...] = (
    Attributes(weight=2.0, classify=0.25),
    RegionBounds(
        weight=3.0,
        of="saliency",
        fit=0.5,
        bounds=(
            Bound(statistic="area", at_most=0.1),
            Bound(statistic="area", at_least=0.9, classes=("owl",)),
            Bound(statistic="row", at_least=1),
        ),
    ),
)


def test_each_loss_is_weighted_and_each_bound_binds_its_samples() -> None:
    context = context_of()
    losses, attribute_BA = losses_of(OBJECTIVES, context), context.student("attributes")
    region_B1HW = context.student("region/saliency")
    attributes = predict_attributes(attribute_BA, LABEL_B, VALUE_KA, labelled_share=0.75)
    classes = supervised(attribute_BA @ WEIGHT_KA.T + BIAS_K, LABEL_B, labelled_share=0.75)
    area_B = region_B1HW.sigmoid().mean((1, 2, 3))
    owls_B = LABEL_B == 1
    beyond = (area_B - 0.1).clamp(min=0).square().sum() + (0.9 - area_B[owls_B]).clamp(min=0).square().sum()
    expected = {
        "attributes.predict": 2 * attributes,
        "attributes.classify": 2 * 0.25 * classes,
        "region_bounds.fit": 0.5 * fit_region(region_B1HW, context.map("saliency")),
        "region_bounds.area": 3 * beyond / 8,
    }
    assert set(losses) == {*expected, "region_bounds.row"}
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)


def test_the_losses_do_not_depend_on_how_a_batch_is_cut() -> None:
    whole = losses_of(OBJECTIVES, context_of())
    parts = [losses_of(OBJECTIVES, context_of(cut=slice(start, start + 2))) for start in range(0, 8, 2)]
    for key, value in whole.items():
        torch.testing.assert_close(torch.stack([part[key] for part in parts]).mean(), value)


def test_bounds_without_classes_need_no_label() -> None:
    context = context_of(label_B=torch.full((8,), -1), share=0.0)
    losses = losses_of([RegionBounds(of="saliency", bounds=(Bound(statistic="area", at_most=0.1),))], context)
    area_B = context.student("region/saliency").sigmoid().mean((1, 2, 3))
    expected = (area_B - 0.1).clamp(min=0).square().mean()
    assert float(losses["region_bounds.area"]) == pytest.approx(float(expected))
    assert float(expected) > 0
