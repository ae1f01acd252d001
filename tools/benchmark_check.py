"""Checks that loader, step and start are as fast as they were, by ratios that a slower machine does not change.

    make benchmark-check      about four minutes; the exit code is 1 where a ratio is over its bound

Each ratio is CPU time over that of a reference in the same run. The bounds lie about a tenth above what the pages of
docs/benchmarks/ say, so a change that costs more is met and the noise of a busy machine mostly is not.
"""

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout

from dpkd.log import logger
from tools import bench_loader, bench_start, bench_step

Ratio = tuple[str, float, float]
"""What is measured over its reference, the ratio, and its bound."""


def main() -> int:
    """Prints each ratio beside its bound; returns the exit code."""
    logger.setLevel("WARNING")
    failed = 0
    for name, ratio, bound in (*_loader(), *_step(), *_start()):
        over = ratio > bound
        failed += over
        print(f"{name:<70} {ratio:6.3f}  at most {bound:.2f}{'  FAILED' if over else ''}", flush=True)
    return 1 if failed else 0


def _loader() -> Iterator[Ratio]:
    rows = ("dpkd, no priors", "dpkd, all default priors", "OpenCV alone")
    arguments = ["--cases", "256x256:224", "--workers", "0", "--images", "300", "--loaders", *rows]
    with redirect_stdout(sys.stderr):
        (case,) = bench_loader.main(arguments)["cases"].values()
    bare_us = case["OpenCV alone"]["us"]
    yield "loader without priors, over a bare OpenCV loop", case["dpkd, no priors"]["us"] / bare_us, 1.1
    yield "loader with all default priors, over that loop", case["dpkd, all default priors"]["us"] / bare_us, 3.0


def _step() -> Iterator[Ratio]:
    with redirect_stdout(sys.stderr):
        results = bench_step.main(["overhead", "--models", "resnet18,vit_tiny_patch16_224"])
    for result in results:
        yield f"step of {result['model']}, over a bare loop", 1 + result["over_bare_percent"] / 100, 1.1


def _start() -> Iterator[Ratio]:
    with redirect_stdout(sys.stderr):
        results = bench_start.main(["--parts", "commands", "--repeats", "3"])
    (figures,) = (value for key, value in results.items() if key.startswith("commands"))
    imports_s = figures[bench_start.BARE]
    for command, bound in (("dpkd --help", 0.1), ("dpkd plan --fast", 0.3), ("dpkd plan", 1.3)):
        yield f"{command}, over {bench_start.BARE}", figures[command] / imports_s, bound


if __name__ == "__main__":
    sys.exit(main())
