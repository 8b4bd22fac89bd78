"""The device mesh of a layout. Axes of size 1 cost no process group."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rung.layout import Layout

__all__ = ["build_mesh"]


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The data mesh: (dp_replicate, dp_shard) when the model is replicated, else (dp_shard,).

    Ranks are numbered as ``Layout.rank`` numbers them: dp_shard is innermost, so the ranks of one copy are neighbours.
    """
    if layout.dp_replicate == 1:
        return init_device_mesh(device_type, (layout.dp_shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(
        device_type, (layout.dp_replicate, layout.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
