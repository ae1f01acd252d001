import json

import pytest

from dpkd.priors import DEFAULT_PRIORS
from tools.bench_prepare import main


@pytest.mark.nightly
def test_the_benchmark_measures_every_default_prior_and_its_ratios_follow_from_its_rates(capsys):
    result = main(["--images", "12", "--size", "48", "--shards", "6", "--kernel-images", "4"])
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("\n{") :]) == result
    assert set(result["map_bytes"]) == {prior.name for prior in DEFAULT_PRIORS}
    assert result["maps_bytes"] == sum(result["map_bytes"].values())
    assert result["kernels_ms"] == pytest.approx(sum(result["kernel_ms"].values()), abs=0.02)
    one, two = (result[f"workers_{n}"]["images_per_s"] for n in (1, 2))
    assert result["two_workers_over_one"] == pytest.approx(two / one, abs=2e-3)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path}: no image below it"):
        main(["--data", str(tmp_path)])
