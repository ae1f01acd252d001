"""What cannot be built, trained or exported is refused, with its key, before any work."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from dpkd.config import apply_override
from dpkd.errors import UserError
from dpkd.settings import Settings
from dpkd.stages.check_networks import check_networks
from dpkd.stages.plan import stages_of
from tests.runs import settings_of, tiny

SMALL = "patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2"
LEARNED = "{kind: learned, of: depth, model: {kind: timm, name: test_vit3, file: FOLDER/vit.pt}}"
TWO_VIEWS = "data.views={global: {count: 2}, local: {count: 2, size: 24}}"
SIGREG = "distill.students.vit.objectives.2={kind: sigreg, views: [global, local]}"
FOLLOWS = "distill.students.conv.objectives.3="


def changed(folder: Path, *overrides: str) -> Settings:
    tree: dict[str, Any] = deepcopy(tiny(folder / "run", source=folder))
    for override in overrides:
        apply_override(tree, override.replace("LEARNED", LEARNED).replace("FOLDER", str(folder)), root=Settings)
    return settings_of(tree)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["teachers.teacher.model.name=resnet19"], r"teachers\.teacher: .*'resnet19'.*nearest: resnet18"),
        (["distill.students.vit.model.arguments={depht: 1}"], r"distill\.students\.vit: .*depht=1"),
        (["distill.students.vit.model={name: inception_v3}"], r"distill\.students\.vit: .*32 px"),
        (["distill.students.conv.weights=FOLDER/vit.pt"], r"distill\.students\.conv: weights .*vit\.pt does not fit"),
        (
            ["distill.students.conv.objectives.0={kind: mixup, stages: 9}"],
            r"students\.conv: objectives\.0: .* 5 stages",
        ),
        ([f"{FOLLOWS}{{kind: locality, layers: {{0: 9}}}}"], r"teachers\.teacher: .* no layer 9"),
        ([f"{FOLLOWS}{{kind: locality, layers: {{9: 0}}}}"], r"distill\.students\.conv: .* no layer 9"),
        ([TWO_VIEWS, SIGREG], r"distill\.students\.vit: .*24 px.*dynamic_img_size"),
        (
            [
                f"distill.students.vit.model={{name: vit_tiny_patch16_224, arguments: {{{SMALL}, global_pool: map}}}}",
                "distill.students.vit.model.pooling={kind: figure_ground}",
            ],
            r"distill\.students\.vit: .* cannot be exported",
        ),
        (
            ["distill.students.vit.model=vgg11", "distill.students.vit.engine.activation_checkpointing=true"],
            r"distill\.students\.vit: engine\.activation_checkpointing",
        ),
        (["teachers.teacher.model={name: test_resnet2, pretrained: true}"], r"teachers\.teacher: .*test_resnet2"),
        (
            [
                "prepare.priors=[{kind: edge}, {kind: saliency}, {kind: superpixel}, LEARNED]",
            ],
            r"learned-depth.*vit\.pt",
        ),
    ],
)
def test_a_network_that_cannot_be_used_is_refused_by_key(overrides: list[str], named: str, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=32).state_dict(), tmp_path / "vit.pt")
    settings = changed(tmp_path, *overrides)
    with pytest.raises(UserError, match=named):
        check_networks(settings, stages_of(settings))


def test_networks_of_finished_stages_are_not_checked(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    settings = changed(tmp_path, "teachers.teacher.weights=FOLDER/other.pt")
    check_networks(settings, ["distill"])
    with pytest.raises(UserError, match=r"teachers\.teacher: weights"):
        check_networks(settings, ["teach", "distill"])


def test_each_network_gets_the_heads_of_its_objectives(tmp_path: Path) -> None:
    networks = check_networks(settings := changed(tmp_path), stages_of(settings))
    assert sorted(networks["teachers.teacher"].spec.heads) == ["prior/edge", "prior/hog"]
    assert sorted(networks["distill.students.vit"].spec.heads) == ["to_teacher/embedding", "to_teacher/patch"]
