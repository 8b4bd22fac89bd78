import numpy as np
import pytest
import torch

from rung.errors import UserError
from rung.models import ModelConfig, build
from rung.rollout import generate
from rung.rollout.generate import sample_token

CONFIG = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.5, max_position_embeddings=12, dropout=0.1,
)  # fmt: skip
PROMPT = [3, 1, 4]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(CONFIG)


def test_greedy_takes_the_likeliest_of_the_window(model):
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(20):  # beyond max_position_embeddings: the oldest tokens fall out of sight
            tokens.append(int(model.eval()(torch.tensor([tokens[-12:]]))[0, -1].argmax()))
    assert generate(model.train(), PROMPT, 20, temperature=0) == tokens[3:]
    assert model.training


def test_draws_depend_on_seed_sample_and_position_only(model):
    first = generate(model, PROMPT, 10, seed=1, sample_id=2)
    assert len(first) == 10 and first == generate(model, PROMPT, 10, seed=1, sample_id=2)
    assert first != generate(model, PROMPT, 10, seed=1, sample_id=3)
    assert first != generate(model, PROMPT, 10, seed=2, sample_id=2)
    assert generate(model, PROMPT + first[:4], 6, seed=1, sample_id=2) == first[4:]


def test_it_ends_with_the_end(model):
    free = generate(model, PROMPT, 10, seed=5)
    end = free.index(free[4])
    assert generate(model, PROMPT, 10, seed=5, eos_id=free[4]) == free[: end + 1]
    assert generate(model, PROMPT, 0) == []


def test_wrong_settings_are_refused_all_at_once(model):
    with pytest.raises(UserError) as caught:
        generate(model, [], 3, temperature=-1.0, top_p=0.0)
    assert str(caught.value).startswith("3 problems")


LOGITS = np.array([0.0, 2.0, -1.0, 2.0, 1.0, -np.inf])


def shares(**kwargs) -> np.ndarray:
    """How a fine grid of uniform numbers is shared out among the tokens."""
    grid = np.arange(5_000) / 5_000
    return np.bincount([sample_token(LOGITS, u, **kwargs) for u in grid], minlength=len(LOGITS)) / len(grid)


def test_uniform_numbers_become_the_softmax():
    for temperature in (1.0, 0.5, 3.0):
        expected = np.exp(LOGITS / temperature)
        np.testing.assert_allclose(shares(temperature=temperature), expected / expected.sum(), atol=4e-4)


def test_filters_keep_the_likeliest_and_of_equals_the_lower_id():
    assert sample_token(LOGITS, 0.99, temperature=0) == 1
    assert shares(top_k=1)[1] == 1
    np.testing.assert_allclose(shares(top_k=2), [0, 0.5, 0, 0.5, 0, 0], atol=4e-4)
    np.testing.assert_allclose(shares(top_p=0.5), [0, 0.5, 0, 0.5, 0, 0], atol=4e-4)
    assert shares(top_p=0.3)[1] == 1
    assert (shares(top_k=3, top_p=0.9) > 0).tolist() == [False, True, False, True, True, False]
    assert sample_token(LOGITS, 1 - 2.0**-53) == 4
