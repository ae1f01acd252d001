"""The losses of statements: weighted as asked, each bound on the samples it names, the same however a batch is cut."""

import pytest
import torch

from dpkd.data.attributes import score_weights
from dpkd.data.stream import Batch
from dpkd.objectives.attributes import classify_by_attributes, predict_attributes
from dpkd.objectives.region_bounds import bound_penalty, fit_region
from dpkd.objectives.settings import Attributes, Bound, RegionBounds
from dpkd.train.statements import ClassAttributes, Statements, statement_losses

VALUE_KA = torch.tensor([[0.0, 1.0, float("nan")], [0.5, 0.2, 1.0]])
WEIGHT_KA, BIAS_K = (torch.from_numpy(array) for array in score_weights(VALUE_KA.numpy()))
STATEMENTS = Statements(("cat", "owl"), ClassAttributes(VALUE_KA, WEIGHT_KA, BIAS_K))
LABEL_B = torch.tensor([0, 1, -1, 1, -1, 0, 1, 1])


def batch_of() -> Batch:
    generator = torch.Generator().manual_seed(0)
    saliency_B1HW = torch.rand(8, 1, 8, 8, generator=generator)
    image_BCHW = torch.randint(0, 256, (8, 3, 16, 16), generator=generator).to(torch.uint8)
    index_B = torch.arange(8)
    return Batch(image_BCHW, LABEL_B, index_B, torch.zeros(8), {"saliency": saliency_B1HW})


def outputs_of() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "attributes": torch.randn(8, 3, generator=generator),
        "region.saliency": torch.randn(8, 1, 4, 4, generator=generator),
    }


OBJECTIVES = (
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
    batch, outputs = batch_of(), outputs_of()
    losses = statement_losses(OBJECTIVES, outputs, batch, statements=STATEMENTS, labelled_share=0.75)
    attributes = predict_attributes(outputs["attributes"], LABEL_B, VALUE_KA, labelled_share=0.75)
    classes = classify_by_attributes(
        outputs["attributes"], LABEL_B, weight_KA=WEIGHT_KA, bias_K=BIAS_K, labelled_share=0.75
    )
    area_B = outputs["region.saliency"].sigmoid().mean((1, 2, 3))
    owls_B = LABEL_B == 1
    beyond = (area_B - 0.1).clamp(min=0).square().sum() + (0.9 - area_B[owls_B]).clamp(min=0).square().sum()
    expected = {
        "attributes": 2 * attributes,
        "attributes.classify": 2 * 0.25 * classes,
        "region.saliency": 0.5 * fit_region(outputs["region.saliency"], batch.priors["saliency"]),
        "region_bounds.saliency.area": 3 * beyond / 8,
    }
    assert set(losses) == {*expected, "region_bounds.saliency.row"}
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)


def test_the_losses_do_not_depend_on_how_a_batch_is_cut() -> None:
    batch, outputs = batch_of(), outputs_of()
    whole = statement_losses(OBJECTIVES, outputs, batch, statements=STATEMENTS, labelled_share=0.75)
    parts = []
    for start in range(0, 8, 2):
        cut = slice(start, start + 2)
        image_BCHW, priors = batch.image_BCHW[cut], {"saliency": batch.priors["saliency"][cut]}
        part = Batch(image_BCHW, LABEL_B[cut], batch.index_B[cut], batch.epoch_B[cut], priors)
        seen = {key: output[cut] for key, output in outputs.items()}
        parts.append(statement_losses(OBJECTIVES, seen, part, statements=STATEMENTS, labelled_share=0.75))
    for key, value in whole.items():
        torch.testing.assert_close(torch.stack([part[key] for part in parts]).mean(), value)


def test_bounds_without_classes_need_no_label() -> None:
    batch = batch_of()
    unlabelled = Batch(batch.image_BCHW, torch.full((8,), -1), batch.index_B, batch.epoch_B, batch.priors)
    objective = RegionBounds(of="saliency", bounds=(Bound(statistic="area", at_most=0.1),))
    outputs = outputs_of()
    losses = statement_losses([objective], outputs, unlabelled, statements=Statements(), labelled_share=0.0)
    area_B = outputs["region.saliency"].sigmoid().mean((1, 2, 3))
    expected = bound_penalty(area_B, statistic="area", at_most=0.1)
    assert float(losses["region_bounds.saliency.area"]) == pytest.approx(float(expected))
    assert float(expected) > 0
