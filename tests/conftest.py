"""What the tests share: one thread a process, and a small sample folder drawn once a session."""

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

# before torch and numpy are imported: two cores carry several processes, and a thread pool in each would fight
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# before Ray is imported, which reads it once
os.environ["RAY_AUTH_MODE"] = "token"

import cv2
import pytest
import torch
from hypothesis import settings

from dpkd.run.folder import RunFolder
from tests.chaos import report
from tests.object_store import ObjectStore, forget_connections
from tests.runs import Command, tiny
from tools.local_ray_cluster import LocalCluster
from tools.make_sample_data import SampleSettings, draw_samples

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# the same examples each time; `make fuzz` takes the long profile and a seed of its own
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("nightly", derandomize=True, deadline=None, max_examples=600)
settings.register_profile("fuzz", deadline=None, max_examples=3_000, print_blob=True)
settings.load_profile("quick")


FIRST = ("whole run", "engines", "object store", "tests/stages/test_prepare.py")
"""The groups that take longest: where several processes share the tests, these begin."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each test a group: with `pytest -n 2 --dist loadgroup` the tests of a group run in one process.

    So a fixture of the session or of a module is made once, though each process has a session of its own.
    """
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: FIRST.index(groups[item]) if groups[item] in FIRST else len(FIRST))


def _group(item: pytest.Item) -> str:
    fixtures = getattr(item, "fixturenames", ())
    if "ray_cluster" in fixtures or "[ray" in item.name:
        return "ray"
    for fixture, group in (("whole", "whole run"), ("object_store", "object store"), ("found", "engines")):
        if fixture in fixtures:
            return group
    return item.nodeid.partition("::")[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Has every test that fails stand in the chaos report, where one is kept."""
    told = yield
    if call.when == "setup":
        report.begin_test()
    if told.failed:
        report.record_failed_test(item.name, phase=call.when)
    return told


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keeps torch and OpenCV to one thread in this process."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal() -> None:
    """Has Ctrl-C and SIGHUP reach the commands under test where a script's `&` or `nohup` took them from this process.

    A program that is started inherits what is ignored, and not what is handled.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `<split>/<class>/*.jpg` of some 300 drawn images with masks, few of them unlabelled; read only."""
    folder = tmp_path_factory.mktemp("sample")
    settings = SampleSettings(
        size=48, base_classes=6, val_classes=5, novel_classes=5, largest=32, smallest=8, evaluation=22, unlabelled=16
    )
    draw_samples(folder, settings=settings, seed=0)
    return folder


@pytest.fixture(scope="session")
def whole(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run from images to exported students that nothing interrupted; read only."""
    command = Command(tiny(tmp_path_factory.mktemp("runs") / "whole", source=sample_folder))
    assert command.wait() == 0, command.output
    return command.folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[LocalCluster]:
    """A Ray cluster of two nodes with a CPU each on this machine, for this session alone."""
    with LocalCluster([1, 1], environment={"PYTHONPATH": str(Path(__file__).resolve().parents[1])}) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def ray_connection(ray_cluster: LocalCluster) -> Iterator[None]:
    """Lets this process be a driver of the cluster."""
    import ray  # noqa: PLC0415  only for tests that use it

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_cluster.client_variables().items():
            patch.setenv(name, value)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def object_store_server() -> Iterator[ObjectStore]:
    """An S3 server on loopback, for this session alone."""
    with ObjectStore() as store:
        yield store


@pytest.fixture
def object_store(object_store_server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """The S3 server, whole, and the environment that leads this process and its children to it."""
    for name, value in object_store_server.variables().items():
        monkeypatch.setenv(name, value)
    forget_connections()
    yield object_store_server
    object_store_server.fault = None
    forget_connections()
