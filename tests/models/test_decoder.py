import dataclasses

import pytest
import torch

from rung.errors import UserError
from rung.models import ModelConfig, build, num_parameters, parameter_shapes
from rung.models.decoder import rotary_tables

SMALL = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2,
)  # fmt: skip


def small(**changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(dataclasses.replace(SMALL, **changes), draws_seed=7).double()


def tokens_of(batch_size: int, length: int) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"qk_norm": True, "head_dim": 10}])
def test_parameters_are_as_the_config_says(changes):
    model = small(**changes)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert found == parameter_shapes(model.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(model.config)
    assert model.init_rules().keys() == found.keys()


def test_initial_weights_follow_the_rules():
    model = build(dataclasses.replace(SMALL, hidden_size=256, num_hidden_layers=2))
    rules = model.init_rules()
    assert rules["layers.1.mlp.down_proj.weight"].std == pytest.approx(0.2 / 2)
    for name, parameter in model.named_parameters():
        if rules[name].kind == "ones":
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(rules[name].std, rel=0.05), name


def test_built_on_meta_and_filled_later():
    whole = small(tie_word_embeddings=True)
    with torch.device("meta"):
        model = build(whole.config).double()
    assert all(parameter.is_meta for parameter in model.parameters()) and not list(model.buffers())
    model.to_empty(device="cpu")
    model.tie_weights()
    assert model.lm_head.weight is model.embed_tokens.weight
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model(tokens_of(1, 9)), whole(tokens_of(1, 9)))


def test_parts_compute_what_the_whole_computes():
    whole, first, last = small(), small(), small()
    del first.layers["2"], last.layers["0"], last.layers["1"]
    first.norm = first.lm_head = last.embed_tokens = None
    tokens = tokens_of(2, 9)
    assert set(first.state_dict()) | set(last.state_dict()) == set(whole.state_dict())
    assert torch.equal(last(first(tokens)), whole(tokens))


@pytest.mark.parametrize("window", [None, 4])
def test_packed_documents_do_not_see_each_other(window):
    model = small(sliding_window=window)
    lengths = [5, 1, 9, 3]
    tokens = tokens_of(2, sum(lengths))
    documents = torch.repeat_interleave(torch.tensor([7, 3, 4, 9]), torch.tensor(lengths)).expand(2, -1)
    positions = torch.arange(sum(lengths)).expand(2, -1)
    packed = model(tokens, positions_BT=positions, document_ids_BT=documents)
    alone = torch.cat([model(document) for document in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(packed, model(tokens))


def test_a_window_as_long_as_the_sequence_changes_nothing():
    tokens = tokens_of(1, 9)
    assert torch.equal(small(sliding_window=9)(tokens), small()(tokens))
    full, windowed = small()(tokens), small(sliding_window=8)(tokens)
    torch.testing.assert_close(windowed[:, :8], full[:, :8], rtol=1e-11, atol=1e-12)
    assert not torch.allclose(windowed[:, 8], full[:, 8])


def test_rotary_tables_keep_float64_and_never_fall_below_float32():
    positions = torch.tensor([[0, 1, 1000]])
    exact = torch.tensor(1000.0, dtype=torch.float64) * SMALL.rope_theta ** (-6 / 8)
    cos_BTE, _ = rotary_tables(SMALL, positions, torch.float64)
    assert cos_BTE.dtype == torch.float64 and cos_BTE.shape == (1, 3, 8)
    assert cos_BTE[0, 2, 3].item() == cos_BTE[0, 2, 7].item() == pytest.approx(exact.cos().item(), rel=1e-13)
    assert rotary_tables(SMALL, positions, torch.bfloat16)[0].dtype == torch.float32


class TestDropout:
    ids = torch.tensor([5, (3 << 40) | 2, 9, 11])

    def run(self, model, rows=slice(None), step=4, **kwargs):
        tokens = tokens_of(4, 6)[rows]
        return model(tokens, sample_ids_B=self.ids[rows], step=torch.tensor(step), **kwargs)

    def test_draws_belong_to_the_sample_and_not_to_its_batch(self):
        model = small(dropout=0.3)
        whole = self.run(model)
        split = torch.cat([self.run(model, slice(0, 1)), self.run(model, slice(1, 4))])
        torch.testing.assert_close(split, whole, rtol=1e-11, atol=1e-12)

    def test_draws_change_with_the_step_the_seed_and_the_sample(self):
        model = small(dropout=0.3)
        first = self.run(model)
        assert torch.equal(first, self.run(model))
        assert not torch.allclose(first, self.run(model, step=5))
        other = build(model.config, draws_seed=8).double()
        other.load_state_dict(model.state_dict())
        assert not torch.allclose(first, self.run(other))
        same_tokens = tokens_of(1, 6).expand(2, -1)
        a, b = model(same_tokens, sample_ids_B=torch.tensor([1, 2]), step=torch.tensor(4))
        assert not torch.allclose(a, b)

    def test_every_place_has_draws_of_its_own(self):
        model = small(dropout=0.3)
        keys = model._step_keys(torch.tensor(3), self.ids, torch.device("cpu"))
        assert keys.shape == (1 + 2 * 3, 2) and len({tuple(key) for key in keys.tolist()}) == 7

    def test_it_keeps_the_mean_and_drops_the_share_asked_for(self):
        model = small(dropout=0.25, hidden_size=512)
        model.layers, model.norm, model.lm_head = torch.nn.ModuleDict(), None, None  # the embedding output remains
        dropped, kept = self.run(model), self.run(model.eval())
        assert (dropped == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
        torch.testing.assert_close(dropped[dropped != 0], (kept / 0.75)[dropped != 0])

    def test_it_is_off_outside_training(self):
        model = small(dropout=0.3)
        assert torch.equal(model.eval()(tokens_of(4, 6)), small()(tokens_of(4, 6)))

    def test_training_without_identities_is_refused(self):
        with pytest.raises(ValueError, match="sample_ids_B"):
            small(dropout=0.3)(tokens_of(1, 6))

    def test_blocks_share_one_compiled_graph(self):
        from torch._dynamo.testing import CompileCounter

        torch._dynamo.reset()
        model, counter = small(dropout=0.3), CompileCounter()
        expected = self.run(model)
        for block in model.blocks():
            block.compile(backend=counter, fullgraph=True)
        # The draws are the same; float64 attention is another sum under compile, so not the same bits.
        torch.testing.assert_close(self.run(model), expected, rtol=1e-13, atol=1e-13)
        assert counter.frame_count == 1


def test_a_wrong_config_is_refused_with_every_problem():
    config = ModelConfig(hidden_size=30, num_attention_heads=4, num_key_value_heads=3, dropout=1.0, residual="ladder")
    with pytest.raises(UserError) as caught:
        build(config)
    message = str(caught.value)
    for part in (
        "num_key_value_heads=3 does not divide num_attention_heads=4; legal values: 1, 2 or 4",
        "num_attention_heads=4 does not divide hidden_size=30",
        "head_dim=7 must be even",
        "dropout=1.0",
        "residual='ladder' is unknown; legal values: standard",
    ):
        assert part in message
    assert message.startswith("5 problems")
