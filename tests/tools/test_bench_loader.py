import json

import pytest

from tools.bench_loader import LOADERS, REFERENCE, main


@pytest.mark.nightly
def test_the_benchmark_has_a_row_for_each_loader_and_says_which_are_not_installed(capsys, tmp_path):
    result = main(f"--cases 64x48:32 --images 64 --turns 2 --json --folder {tmp_path}".split())
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :]) == result
    for rows in result["cases"].values():
        assert rows.keys() == LOADERS.keys()
        assert rows[REFERENCE]["ratio"] == 1
        measured = {name: row for name, row in rows.items() if row["ratio"]}
        assert all(row["us"] > 0 for row in measured.values())
        assert {"dpkd, no priors", "ImageFolder, PIL", "OpenCV alone"} <= measured.keys()
        assert all("No module named" in row["us"] for name, row in rows.items() if name not in measured)
