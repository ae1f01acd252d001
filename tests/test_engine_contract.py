"""What every engine promises, shown over plain PyTorch and DeepSpeed at ZeRO 0 to 3, on one process and on two.

The cases run once, in processes of their own (engine_cases.py); the tests look at what they left. The numbers are
checked against a loop in float64 written here, without any engine.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpkd.backends.deepspeed_engine import import_deepspeed
from dpkd.engine.world import World
from dpkd.errors import UserError
from tests.engine_cases import ADAMW, EMA, NUM_MICROS, PAIRS, SAVED_AT, STAGE, STEPS, Net, Trace, micro_batch, rate
from tests.processes import run_ranks

pytestmark = pytest.mark.slow
KINDS = tuple(STAGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def printed_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one process prints that trains with every engine where there is no compiler, no ninja and no built op."""
    empty = tmp_path_factory.mktemp("empty")
    environment = {"PATH": str(empty), "TORCH_EXTENSIONS_DIR": str(empty)}
    printed = run_ranks("tests.engine_cases", str(folder), size=1, environment=environment)
    assert not list(empty.iterdir())
    return printed


@pytest.fixture(scope="module")
def found(folder: Path, printed_alone: str) -> dict[int, list[dict[str, Any]]]:
    """What the engines did, by world size and rank."""
    run_ranks("tests.engine_cases", str(folder), size=2)
    names = {size: [folder / f"{size}-{rank}.pt" for rank in range(size)] for size in (1, 2)}
    return {size: [torch.load(path, weights_only=False) for path in paths] for size, paths in names.items()}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """Losses, norms and averaged weights of the same training in float64, in one plain loop."""
    net = Net(seed=0).double()
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[name]], "weight_decay": 0.1 if parameters[name].ndim > 1 else 0.0} for name in names]
    )
    average = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    losses, norms = [], []
    for step in range(STEPS):
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        seen = {"norm.running_mean": torch.zeros(8).double(), "norm.running_var": torch.zeros(8).double()}
        optimizer.zero_grad()
        losses.append(0.0)
        for position in range(NUM_MICROS):
            image_BCHW, label_B = micro_batch(step, position)
            stem_BCHW = nn.functional.conv2d(image_BCHW.double(), net.stem.weight)
            seen["norm.running_mean"] += stem_BCHW.mean((0, 2, 3)) / NUM_MICROS
            seen["norm.running_var"] += stem_BCHW.transpose(0, 1).flatten(1).var(1) / NUM_MICROS
            outputs = net(image_BCHW.double())
            loss = nn.functional.cross_entropy(outputs["logits"], label_B) / NUM_MICROS
            (loss + 0 * outputs["unused"].sum()).backward()  # no loss reaches that head: its gradient is zero
            losses[-1] += float(loss.detach())
        gradients = {name: parameters[name].grad.data for name in names}  # type: ignore[union-attr]
        norms.append(float(sum(float((gradient**2).sum()) for gradient in gradients.values())) ** 0.5)
        for name in names:
            gradients[name].mul_(min(1.0, (ADAMW.clip or 0.0) / norms[-1]))
        for name, group in zip(names, optimizer.param_groups, strict=True):
            group["lr"] = rate(step) * (0.5 if name.startswith("wide") else 1.0)
        optimizer.step()
        for name, statistic in seen.items():
            net.get_buffer(name).copy_(0.9 * before[name] + 0.1 * statistic)
        decay = min(EMA, (2 + step) / (11 + step))
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * tensor
    return {"objectives": losses, "norms": norms, "weights": average}


def joined(case: dict[str, Any], field: str) -> list[Any]:
    return getattr(case["start"], field) + getattr(case["rest"], field)


def equal(one: Trace, other: Trace) -> bool:
    """True where two traces agree bit for bit."""
    return (
        one.losses == other.losses
        and one.norms == other.norms
        and all(map(torch.equal, one.predictions, other.predictions))
        and all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_norms_equal_the_reference(found: Any, reference: Any, kind: str, size: int) -> None:
    for rank in found[size]:
        assert joined(rank[kind], "losses") == pytest.approx(reference["objectives"], rel=1e-4)
        assert joined(rank[kind], "norms") == pytest.approx(reference["norms"], rel=1e-3)


def test_the_cases_clip(reference: Any) -> None:
    assert min(reference["norms"][:2]) > (ADAMW.clip or 0.0)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_average_of_the_reference(found: Any, reference: Any, kind: str, size: int) -> None:
    weights = found[size][0][kind]["rest"].weights
    assert list(weights) == list(reference["weights"])
    for name in set(weights) - {"norm.num_batches_tracked"}:
        torch.testing.assert_close(weights[name].double(), reference["weights"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_sees_the_same_and_rank_0_alone_builds_the_weights(found: Any, kind: str) -> None:
    first, second = (rank[kind]["rest"] for rank in found[2])
    assert first.weights
    assert second.weights == {}
    first = replace(first, weights={})
    assert equal(first, second)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_the_averaged_weights(found: Any, kind: str, size: int) -> None:
    trace = found[size][0][kind]["rest"]
    net = Net(seed=9)
    net.load_state_dict(trace.weights)
    expected = net.eval()(micro_batch(STEPS - 1, 0)[0])["logits"]
    torch.testing.assert_close(trace.predictions[-1], expected)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_continues_bit_for_bit(found: Any, kind: str, size: int) -> None:
    for rank in found[size]:
        assert equal(rank[kind]["rest"], rank[kind][f"from {size}-{kind}"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_sgd_state_continues_bit_for_bit(found: Any, kind: str) -> None:
    assert equal(found[1][0][kind]["sgd rest"], found[1][0][kind]["sgd resumed"])


@pytest.mark.parametrize("source", ["torch", "zero3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_loads_at_another_world_size_and_into_another_engine(found: Any, kind: str, source: str) -> None:
    loaded, written = found[2][0][kind][f"from 1-{source}"], found[1][0][source]["rest"]
    assert loaded.losses == pytest.approx(written.losses, rel=1e-5)
    assert loaded.norms == pytest.approx(written.norms, rel=1e-4)
    for name, weight in written.weights.items():
        torch.testing.assert_close(loaded.weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["torch", "zero3"])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_load_each_group_has_its_rate_and_decay_and_each_tensor_its_own_count(
    found: Any, kind: str, source: str
) -> None:
    """DeepSpeed's own loading gives all groups at ZeRO-3 the values of the first, and all tensors one count."""
    facts = found[2][0][kind][f"optimizer from 1-{source}"]
    last = rate(STEPS - 1)
    assert facts["groups"] == {(last, 0.1), (last, 0.0), (0.5 * last, 0.1), (0.5 * last, 0.0)}
    assert facts["counts"] == {float(STEPS)}
    assert facts["counts are their own"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_sgd_without_clipping_or_average_equals_plain_pytorch(found: Any, kind: str, size: int) -> None:
    for part in ("sgd start", "sgd rest"):
        expected, case = found[1][0]["torch"][part], found[size][0][kind][part]
        assert case.losses == pytest.approx(expected.losses, rel=1e-4)
        assert case.norms == pytest.approx(expected.norms, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_the_same_in_every_engine_and_keeps_fp32_weights(found: Any, reference: Any, kind: str) -> None:
    case = found[1][0][kind]["bf16"]
    assert case.losses == pytest.approx(found[1][0]["torch"]["bf16"].losses, rel=1e-3)
    assert case.losses == pytest.approx(reference["objectives"][:SAVED_AT], rel=5e-2)
    assert case.losses != found[1][0][kind]["start"].losses
    assert {tensor.dtype for tensor in case.weights.values()} == {torch.float32, torch.int64}
    assert case.predictions[0].dtype == torch.float32


@pytest.mark.parametrize("pair", PAIRS)
def test_a_teacher_and_a_student_train_side_by_side(found: Any, pair: tuple[str, str]) -> None:
    expected, case = found[1][0]["torch+torch"], found[2][0]["+".join(pair)]
    assert case.losses == pytest.approx(expected.losses, rel=1e-4)
    assert case.norms == pytest.approx(expected.norms, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_stay(found: Any, kind: str) -> None:
    assert torch.equal(found[2][0][kind]["rest"].weights["stem.weight"], Net(seed=0).stem.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_other_settings_is_refused_by_name(found: Any, kind: str) -> None:
    message = found[1][0][kind]["refused"]
    assert "average/" in message
    assert "only on disk" in message


def test_every_tensor_stands_in_one_part(folder: Path, found: Any) -> None:
    for size in (1, 2):
        assert len(list((folder / f"state-{size}-zero3").glob("part-*"))) == size


def test_engines_need_no_compiler_and_print_nothing(printed_alone: str) -> None:
    assert printed_alone == ""


def test_a_missing_deepspeed_is_the_users_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "cpu" if name == "DS_ACCELERATOR" else "0")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        import_deepspeed(World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
