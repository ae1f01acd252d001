"""How many workers a cluster has room for."""

from hypothesis import given
from hypothesis import strategies as st

from dpkd.launch.world_size import NodeResources, WorldSizeRange, cpus_per_worker

ROOMS = st.lists(st.builds(NodeResources, cpus=st.integers(0, 9), gpus=st.integers(0, 3)), max_size=4)


def cpu_nodes(*cpus: int) -> list[NodeResources]:
    return [NodeResources(each) for each in cpus]


def test_workers_share_the_cpus_of_uneven_nodes():
    assert cpus_per_worker(cpu_nodes(1, 1), num_workers=2) == 1
    assert cpus_per_worker(cpu_nodes(8, 4), num_workers=3) == 4
    assert cpus_per_worker(cpu_nodes(7, 4), num_workers=3) == 3
    assert cpus_per_worker(cpu_nodes(2), num_workers=3) == 0
    assert cpus_per_worker([], num_workers=1) == 0


def test_a_node_without_a_gpu_has_no_room_for_a_worker_that_takes_one():
    nodes = [NodeResources(8), NodeResources(16, gpus=4)]
    assert cpus_per_worker(nodes, num_workers=4, use_gpu=True) == 4
    assert cpus_per_worker(nodes, num_workers=5, use_gpu=True) == 0


def test_a_session_has_as_many_workers_as_there_is_room_for():
    sizes = WorldSizeRange((2, 4, 8))
    assert sizes.choose(cpu_nodes(4, 4), threads=None, use_gpu=False) == 8
    assert sizes.choose(cpu_nodes(4, 3), threads=None, use_gpu=False) == 4
    assert sizes.choose(cpu_nodes(4, 4), threads=2, use_gpu=False) == 4
    assert sizes.choose(cpu_nodes(1), threads=None, use_gpu=False) == 2
    assert [sizes.above(size) for size in (2, 4, 8)] == [4, 8, None]


@given(rooms=ROOMS, num_workers=st.integers(1, 12), use_gpu=st.booleans())
def test_the_share_is_the_largest_that_fits(rooms, num_workers, use_gpu):
    def fits(share: int) -> bool:
        left = [[room.cpus, room.gpus if use_gpu else num_workers] for room in rooms]
        placed = 0
        for node in left:
            while node[0] >= share and node[1] >= 1 and placed < num_workers:
                node[0], node[1], placed = node[0] - share, node[1] - 1, placed + 1
        return placed == num_workers

    share = cpus_per_worker(rooms, num_workers=num_workers, use_gpu=use_gpu)
    assert [each for each in range(1, 11) if fits(each)] == list(range(1, share + 1))
