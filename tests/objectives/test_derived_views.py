"""Views derived from the global view: turned images, and mixed pixels and features, against NumPy and by hand."""

import numpy as np
import pytest
import torch
from scipy import stats

from dpkd.data.batch import Batch, View
from dpkd.errors import UserError
from dpkd.models.backbone import LayerMix
from dpkd.models.network import build_network
from dpkd.models.settings import ModelSettings, NetworkSpec
from dpkd.objectives.base import Context, Draw, Supervision
from dpkd.objectives.draws import beta
from dpkd.objectives.mixup import Mixed, Mixup
from dpkd.objectives.pseudo_labels import PseudoLabels, Strong
from dpkd.objectives.rotation import Rotation, Turned, turned
from dpkd.objectives.supervised import supervised

MANY = torch.arange(4000)
MIXED = Mixed(alpha=1, stages=0, share=1.0).name


def draw(index_B: torch.Tensor, *, step: int = 3, seed: int = 0) -> Draw:
    return Draw(index_B, step=step, seed=seed, grid=(4, 4))


def context(
    batch_size: int, outputs: dict, facts: dict, *, label_B: torch.Tensor, labelled_share: float = 1.0
) -> Context:
    index_B = torch.arange(batch_size)
    view = View(torch.zeros(batch_size, 3, 8, 8, dtype=torch.uint8))
    batch = Batch({"global": view}, {"class": label_B}, index_B, index_B)
    supervision = Supervision(("a", "b", "c"), labelled_share, torch.zeros(3))
    return Context(batch, outputs, {}, supervision, step=3, seed=0, facts=facts)


def test_a_turn_is_that_of_numpy():
    image_BCHW, turn_B = torch.randn(8, 3, 5, 5), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    result_BCHW = turned(image_BCHW, turn_B)
    for image_CHW, quarters, result_CHW in zip(image_BCHW.numpy(), turn_B.tolist(), result_BCHW.numpy(), strict=True):
        np.testing.assert_array_equal(result_CHW, np.rot90(image_CHW, quarters, (1, 2)))


def test_the_map_that_weighs_patches_turns_with_its_image():
    image_B1HW = torch.rand(16, 1, 6, 6)
    derived = Turned(1.0).derive([image_B1HW, image_B1HW], draw(torch.arange(16)))
    torch.testing.assert_close(derived.inputs[0], derived.inputs[1])
    assert not torch.equal(derived.inputs[0], image_B1HW)


def test_turns_are_equally_likely_and_belong_to_the_sample():
    turn_N = Turned(1.0).derive([torch.zeros(4000, 1, 1, 1)], draw(MANY)).facts["turn"]
    assert stats.chisquare(torch.bincount(turn_N, minlength=4)).pvalue > 1e-3
    order_N = torch.randperm(4000)
    again_N = Turned(1.0).derive([torch.zeros(4000, 1, 1, 1)], draw(MANY[order_N])).facts["turn"]
    assert torch.equal(again_N, turn_N[order_N])
    other_N = Turned(1.0).derive([torch.zeros(4000, 1, 1, 1)], draw(MANY, step=4)).facts["turn"]
    assert 0.2 < (other_N == turn_N).float().mean() < 0.3


def test_rotation_is_the_cross_entropy_of_the_turn_over_its_share_of_the_images():
    logits_R4, turn_R = torch.randn(3, 4), torch.tensor([2, 0, 3])
    view = Turned(0.5).name
    given = context(6, {view: {"rotation": logits_R4}}, {view: {"turn": turn_R}}, label_B=torch.zeros(6).long())
    expected = -logits_R4.log_softmax(1)[range(3), turn_R].mean()
    torch.testing.assert_close(Rotation(share=0.5, weight=2.0).loss(given), 2 * expected)
    assert len(Turned(0.5).derive([torch.zeros(6, 3, 4, 4)], draw(torch.arange(6))).facts["turn"]) == 3


@pytest.mark.parametrize("alpha", [1, 2, 5])
def test_shares_follow_the_beta_distribution(alpha):
    share_N = beta(MANY, alpha, step=0, seed=1, stream=7)
    assert stats.kstest(share_N.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_pixels_are_mixed_with_those_of_the_previous_image():
    image_BCHW = torch.randn(5, 3, 4, 4)
    derived = Mixed(alpha=1, stages=0, share=1.0).derive([image_BCHW], draw(torch.arange(5)))
    assert derived.mix is None
    for row, share in enumerate(derived.facts["share"]):
        torch.testing.assert_close(derived.inputs[0][row], share * image_BCHW[row] + (1 - share) * image_BCHW[row - 1])


def test_the_place_of_a_mix_is_each_of_the_first_stages_in_turn():
    places = []
    for step in range(300):
        mix = Mixed(alpha=1, stages=2, share=1.0).derive([torch.zeros(2, 3, 4, 4)], draw(MANY[:2], step=step)).mix
        places.append(0 if mix is None else mix.stage)
    assert stats.chisquare(np.bincount(places, minlength=3)).pvalue > 1e-3


def test_mixup_is_the_cross_entropy_of_both_labels_by_their_shares():
    logits_BK, label_B, share_B = torch.randn(4, 3), torch.tensor([0, 2, -1, 1]), torch.tensor([0.9, 0.3, 0.5, 0.6])
    facts = {MIXED: {"share": share_B, "partner": torch.tensor([3, 0, 1, 2])}}
    given = context(4, {MIXED: {"logits": logits_BK}}, facts, label_B=label_B, labelled_share=0.75)
    surprise_BK = -logits_BK.log_softmax(1)
    terms = [0.9 * surprise_BK[0, 0], 0.1 * surprise_BK[0, 1], 0.3 * surprise_BK[1, 2], 0.7 * surprise_BK[1, 0]]
    terms += [0.5 * surprise_BK[2, 2], 0.6 * surprise_BK[3, 1]]  # a hidden label does not count
    torch.testing.assert_close(Mixup().loss(given), torch.stack(terms).sum() / (4 * 0.75))


def test_mixup_with_whole_shares_is_the_supervised_loss():
    logits_BK, label_B = torch.randn(4, 3), torch.tensor([0, 2, -1, 1])
    facts = {MIXED: {"share": torch.ones(4), "partner": torch.tensor([3, 0, 1, 2])}}
    given = context(4, {MIXED: {"logits": logits_BK}}, facts, label_B=label_B, labelled_share=0.75)
    torch.testing.assert_close(Mixup().loss(given), supervised(logits_BK, label_B, labelled_share=0.75))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}),
    ],
)
def test_features_are_mixed_after_the_stage_and_in_the_rows_of_the_view_alone(name, arguments):
    spec = NetworkSpec(
        model=ModelSettings(name=name, arguments=arguments),
        classes=("a", "b"),
        image_size=32,
        mean=(0,) * 3,
        std=(1,) * 3,
    )
    network = build_network(spec, seed=0).eval()
    image_BCHW = torch.randn(5, 3, 32, 32)
    plain = network(image_BCHW)["embedding"]
    mix = LayerMix(2, torch.tensor([0.25, 1.0, 0.5]), torch.tensor([2, 0, 1]))
    with network.backbone.mixing([(2, mix)]):
        mixed = network(image_BCHW)["embedding"]
    unmoved = [0, 1, 3]  # not of the view, or with its whole share
    torch.testing.assert_close(mixed[unmoved], plain[unmoved])
    assert not torch.allclose(mixed[[2, 4]], plain[[2, 4]], atol=1e-3)
    torch.testing.assert_close(network(image_BCHW)["embedding"], plain)  # the hooks are gone
    stage = network.backbone.timm.get_submodule(network.backbone.timm.feature_info[1]["module"])
    features = []
    hook = stage.register_forward_hook(lambda _module, _inputs, output: features.append(output))
    network(image_BCHW)
    hook.remove()
    expected = 0.25 * features[0][2] + 0.75 * features[0][4]
    hook = stage.register_forward_hook(lambda _module, _inputs, output: torch.cat([expected[None], output[1:]]))
    torch.testing.assert_close(network(image_BCHW)["embedding"][0], mixed[2], rtol=1e-4, atol=1e-5)
    hook.remove()


def test_a_mix_after_a_stage_that_the_model_lacks_is_refused():
    spec = NetworkSpec(
        model=ModelSettings(name="resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}),
        classes=("a", "b"),
        image_size=32,
        mean=(0,) * 3,
        std=(1,) * 3,
    )
    backbone = build_network(spec, seed=0).backbone
    mix = LayerMix(6, torch.ones(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match=r"resnet18.*5 stages.*mixup.stages=6"), backbone.mixing([(0, mix)]):
        pass


def test_without_magnitude_a_strong_view_is_the_image():
    image_BCHW, map_B1HW = torch.randn(6, 3, 20, 20), torch.rand(6, 1, 5, 5)
    derived = Strong(magnitude=0.0, share=0.5).derive([image_BCHW, map_B1HW], draw(torch.arange(6)))
    torch.testing.assert_close(derived.inputs[0], image_BCHW[:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(derived.inputs[1], map_B1HW[:3], rtol=0, atol=1e-5)


def test_a_strong_view_belongs_to_the_sample_and_the_step():
    image_BCHW, index_B = torch.randn(8, 3, 16, 16), torch.arange(8)
    strong = Strong(magnitude=1.0, share=1.0)
    whole = strong.derive([image_BCHW], draw(index_B)).inputs[0]
    torch.testing.assert_close(strong.derive([image_BCHW[5:]], draw(index_B[5:])).inputs[0], whole[5:])
    assert not torch.allclose(strong.derive([image_BCHW], draw(index_B, step=4)).inputs[0], whole)


def test_a_strong_view_moves_its_map_and_lacks_a_square():
    """A grey image with a dark figure keeps its grey whatever the colours do, so figure and map can be compared."""
    figure_11HW = torch.zeros(1, 1, 32, 32)
    figure_11HW[..., 8:20, 10:24] = 1
    image_B3HW = (2 + figure_11HW).expand(64, 3, -1, -1)
    derived = Strong(magnitude=0.8, share=1.0).derive([image_B3HW, figure_11HW.expand(64, -1, -1, -1)], draw(MANY[:64]))
    image_B3HW, map_B1HW = derived.inputs
    assert torch.equal(image_B3HW[:, 0], image_B3HW[:, 2])
    hole_share = (image_B3HW[:, 0] == 0).float().mean()
    assert 0.05 < hole_share < (0.5 * 0.8) ** 2 + 0.01  # holes at the border are smaller
    for image_HW, map_HW in zip(image_B3HW[:, 0], map_B1HW[:, 0], strict=True):
        seen_HW = (image_HW != 0) & ((map_HW == 0) | (map_HW == 1))
        value_N, is_figure_N = image_HW[seen_HW], map_HW[seen_HW] == 1
        if is_figure_N.any() and not is_figure_N.all():
            assert value_N[is_figure_N].mean() > value_N[~is_figure_N].mean()


def test_pseudo_labels_count_where_the_network_is_sure():
    weak_BK = torch.tensor([[9.0, 0, 0], [1.0, 0.5, 0], [0, 0, 8.0], [0, 9.0, 0]], requires_grad=True)
    strong_RK = torch.randn(3, 3, requires_grad=True)
    given = context(
        4, {"global": {"logits": weak_BK}, Strong(1.0, 0.75).name: {"logits": strong_RK}}, {}, label_B=-torch.ones(4)
    )
    loss = PseudoLabels(weight=2.0, share=0.75).loss(given)
    surprise_RK = -strong_RK.log_softmax(1)
    torch.testing.assert_close(loss, 2 * (surprise_RK[0, 0] + surprise_RK[2, 2]) / 3)
    loss.backward()
    assert weak_BK.grad is None


def test_views_of_other_settings_have_other_names():
    """Outputs are found by name, so two objectives of one kind with other settings would read the same view."""
    views = [Turned(0.5), Turned(1.0), Mixed(1, 0, 0.5), Mixed(1, 2, 0.5), Mixed(2, 0, 0.5), Strong(1.0, 0.5)]
    views += [Strong(0.5, 0.5), Strong(1.0, 1.0)]
    assert len({view.name for view in views}) == len(views)
    assert Strong(1.0, 0.5).name == Strong(1.0, 0.5).name
