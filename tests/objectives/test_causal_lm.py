from types import SimpleNamespace

import torch
import torch.nn.functional as F

from rung.objectives import CausalLM


def test_sums_and_counts_make_the_mean():
    logits = torch.randn(3, 5, 11, dtype=torch.float64)
    labels = torch.randint(11, (3, 5))
    labels[0] = labels[1, 2] = -100
    batch = SimpleNamespace(labels_BT=labels)
    objective = CausalLM()
    counts, sums = objective.counts(batch), objective.sums(logits, batch)
    assert counts.keys() == sums.keys() == objective.weights.keys()
    assert counts["loss"].dtype == torch.int64 and counts["loss"].ndim == sums["loss"].ndim == 0
    assert counts["loss"] == 9
    mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(sums["loss"] / counts["loss"], mean)


def test_a_batch_without_labels_adds_nothing():
    logits = torch.randn(2, 3, 7, dtype=torch.bfloat16, requires_grad=True)
    batch = SimpleNamespace(labels_BT=torch.full((2, 3), -100))
    loss = CausalLM().sums(logits, batch)["loss"]
    loss.backward()
    assert CausalLM().counts(batch)["loss"] == 0 and loss == 0 and loss.dtype == torch.float32
    assert torch.equal(logits.grad, torch.zeros_like(logits))
