import json

import pytest

from tools.bench_start import main


@pytest.mark.nightly
def test_the_benchmark_opens_data_sets_without_shards(capsys):
    result = main(["--parts", "opening", "--samples", "2000", "3000", "--repeats", "1", "--json"])
    assert json.loads(capsys.readouterr().out) == result
    (small, large) = (figures for part, figures in result.items() if part.startswith("opening"))
    assert set(small) == set(large) == {"cpu", "first batch", "peak MB", "MB"}
    assert 0 <= small["first batch"] <= small["cpu"]  # CPU time has a coarse clock
    assert small["cpu"] > 0
