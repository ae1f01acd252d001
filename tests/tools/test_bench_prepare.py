import json

import pytest

from dpkd.priors import DEFAULT_PRIORS
from tools.bench_prepare import ROOT, main


@pytest.mark.nightly
def test_the_benchmark_measures_every_default_prior_of_both_sides(capsys):
    result = main(["--images", "4", "--size", "48", "--rounds", "2", "--against", str(ROOT)])
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("\n{") :]) == result
    names = {prior.name for prior in DEFAULT_PRIORS}
    assert set(result["map_bytes"]) == names
    assert set(result["kernels"]) == names | {"stage", "decode", "views", "encode", "kernels"}
    for row in result["kernels"].values():
        assert len(row["ms"]) == 2
        assert row["ratio"] == sorted(row["ratio"])


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path}: no image below it"):
        main(["--data", str(tmp_path)])
