import json

import pytest

from tools.bench_checkpoint import main


@pytest.mark.nightly
@pytest.mark.slow
def test_the_benchmark_of_saves_measures_a_network_whose_state_is_three_times_its_weights(capsys):
    small = ["--engines", "torch", "--workers", "1", "--model", "vit_tiny_patch16_224", "--batch-size", "2"]
    (result,) = main([*small, "--image-size", "32", "--saves", "2", "--steps", "2", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["weights_mb"] == pytest.approx(22, abs=1)  # 5.5 M parameters
    assert result["state_mb"] == pytest.approx(3 * result["weights_mb"], rel=0.01)
    assert 0 < result["snapshot_s"] <= result["stall_s"] <= result["worst_stall_s"]
    assert 0 < result["share_of_time_between_saves"] < 1
