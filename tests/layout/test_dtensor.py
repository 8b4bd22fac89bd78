"""``from_tensor`` against torch's own DTensors on four gloo ranks: one call, many tensors."""

from layout import dtensor_ranks


def test_dtensors_on_four_ranks(workers):
    workers.run(dtensor_ranks.WORLD_SIZE, dtensor_ranks.check_everything)
