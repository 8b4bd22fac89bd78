"""Layouts: sizes, coordinates and groups as arithmetic, and what they say to a person who got them wrong."""

import subprocess
import sys
from itertools import product

import pytest

from rung.errors import UserError
from rung.layout import Layout


def test_the_package_imports_no_torch():
    code = "import sys, rung.layout; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_dp_shard_takes_what_is_left():
    assert Layout() == Layout(dp_shard=1)
    assert Layout(tp=2, pp=2, dp_replicate=2, world_size=32).dp_shard == 4
    assert Layout(dp_replicate=2, dp_shard=3, cp=2, world_size=12).data_size == 6


@pytest.mark.parametrize("degrees", [(1, 1, 1, 1, 1, 1), (2, 3, 2, 2, 2, 3), (1, 2, 3, 1, 2, 4), (2, 1, 1, 4, 1, 1)])
def test_coordinates_and_groups_cover_the_world(degrees):
    dp_replicate, dp_shard, tp, pp, cp, ep = degrees
    world_size = dp_replicate * dp_shard * tp * pp * cp
    layout = Layout(dp_replicate, dp_shard, tp, pp, cp, ep, world_size)
    assert [layout.rank(**layout.coordinate(rank)) for rank in range(world_size)] == list(range(world_size))
    assert list(layout.coordinate(0)) == ["pp", "dp_replicate", "dp_shard", "cp", "tp"]
    places = [tuple(layout.expert_coordinate(rank).values()) for rank in range(world_size)]
    assert places == list(product(*map(range, layout.expert_mesh.values())))
    for axis, size in {**layout.mesh, **layout.expert_mesh}.items():
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))
        assert {len(group) for group in groups} == {size}
    for group in layout.groups("dp_replicate", "dp_shard"):
        assert [layout.data_rank(rank) for rank in group] == list(range(layout.data_size))


def test_neighbours_share_a_tp_group_and_experts_borrow_dp_shard_and_cp():
    layout = Layout(tp=2, cp=2, ep=4, pp=2, world_size=16)
    assert layout.groups("tp")[:2] == [[0, 1], [2, 3]]
    assert layout.groups("ep") == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert layout.groups("pp")[0] == [0, 8]
    with pytest.raises(ValueError, match="not different axes"):
        layout.groups("ep", "cp")


@pytest.mark.parametrize(
    ("degrees", "says"),
    [
        ({"tp": 3, "world_size": 8}, ["tp=3", "= 3 does not divide world_size=8", "set tp to 1, 2, 4 or 8"]),
        ({"tp": 2, "dp_shard": 4, "world_size": 4}, ["= 8 is not world_size=4", "start 8 processes", "dp_shard to 2"]),
        ({"ep": 3, "cp": 2, "world_size": 8}, ["ep=3 does not divide dp_shard × cp = 8", "1, 2, 4 or 8"]),
        ({"dp_shard": 4, "ep": 3, "world_size": 6}, ["2 problems", "dp_shard=4", "set dp_shard to 6", "ep=3"]),
        ({"tp": 0, "pp": -2, "dp_shard": -3, "ep": 2.0}, ["4 problems", "tp=0", "pp=-2", "dp_shard=-3", "ep=2.0"]),
    ],
)
def test_all_errors_at_once_with_values_and_fix(degrees, says):
    with pytest.raises(UserError) as error:
        Layout(**degrees)
    for text in says:
        assert text in str(error.value)


def test_batch_sizes():
    layout = Layout(dp_replicate=2, tp=2, world_size=8)
    assert layout.check_batch(16, 2) == []
    assert layout.accumulation(16, 2) == 2
    assert "use 4 or 8" in layout.check_batch(6, 1)[0]
    assert "legal values: 1, 2 or 4" in layout.check_batch(16, 3)[0]
    assert len(layout.check_batch(0, 0)) == 2
    with pytest.raises(UserError, match="micro_batch_size=3"):
        layout.accumulation(16, 3)


@pytest.mark.parametrize("world_size", range(2, 17, 2))
def test_auto_fills_any_world(world_size):
    layout = Layout.auto(world_size, dp_replicate=4, tp=2)
    assert (layout.tp, layout.data_size) == (2, world_size // 2)
    assert layout.dp_replicate in (1, 2, 4)
