"""The routing: top-k of float32 logits, softmax over the chosen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora.gating import forced, gate_cross_entropy, gate_logits, route


@given(st.integers(0, 5), st.integers(1, 6), st.data(), st.floats(0.05, 50), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_route_is_top_k_and_softmax_written_out(tokens, adapters, data, temperature, seed):
    k = data.draw(st.integers(1, adapters))
    # few distinct values: ties are common
    logits = torch.randint(-2, 3, (tokens, adapters), generator=torch.Generator().manual_seed(seed)).float()
    routing = route(logits, k, temperature)
    assert routing.indices.shape == routing.weights.shape == (tokens, k)
    assert routing.indices.dtype == torch.int64 and routing.weights.dtype == torch.float32
    for row in range(tokens):
        chosen = routing.indices[row].tolist()
        assert len(set(chosen)) == k
        values = [logits[row, n].item() for n in chosen]
        assert values == sorted(logits[row].tolist(), reverse=True)[:k]
        exponentials = torch.tensor([v / temperature for v in values], dtype=torch.float64).exp()
        torch.testing.assert_close(
            routing.weights[row].double(), exponentials / exponentials.sum(), rtol=1e-4, atol=1e-6
        )


def test_top_1_has_weight_1_and_sends_the_gate_no_gradient():
    gate = torch.randn(4, 8, requires_grad=True)
    routing = route(gate_logits(torch.randn(5, 8), gate), 1, 3.0)
    assert torch.equal(routing.weights, torch.ones(5, 1))
    (gradient,) = torch.autograd.grad(routing.weights.sum() * 7, gate)
    assert not gradient.any()


@given(st.integers(1, 5), st.integers(1, 6), st.data(), st.floats(0.05, 50), st.floats(0, 0.99), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_an_unsure_gate_gives_no_weight(tokens, adapters, data, temperature, least, seed):
    """Whatever the temperature; where it is sure enough, the weights are what they ever are."""
    k = data.draw(st.integers(1, adapters))
    logits = torch.randn(tokens, adapters, generator=torch.Generator().manual_seed(seed))
    usual, found = route(logits, k, temperature), route(logits, k, temperature, least)
    assert torch.equal(found.indices, usual.indices)
    for row in range(tokens):
        share = torch.softmax(logits[row].double(), -1)[usual.indices[row]].sum().item()
        if abs(share - least) > 1e-5:
            assert torch.equal(found.weights[row], usual.weights[row] * (share >= least))


def test_an_unsure_gate_still_learns_from_the_tokens_it_is_sure_of():
    logits = torch.tensor([[5.0, 0.0, -5.0], [0.1, 0.0, -0.1]], requires_grad=True)
    (gradient,) = torch.autograd.grad(route(logits, 2, 1.0, 0.9).weights[:, 0].sum(), logits)
    assert gradient[0].any() and not gradient[1].any()


def test_nan_stays_in_its_token():
    logits = torch.randn(3, 4)
    logits[1] = torch.nan
    for least in (0.0, 0.1):
        routing = route(logits, 2, 1.0, least)
        assert torch.isnan(routing.weights).any(1).tolist() == [False, True, False]
    assert routing.indices.min() >= 0 and routing.indices.max() < 4


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_float32_whatever_the_input(autocast):
    x, gate = torch.randn(6, 32).bfloat16(), torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = gate_logits(x, gate)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ gate.T)


def test_forced_is_one_adapter_of_weight_1():
    routing = forced(torch.tensor([2, 0, 2]))
    assert routing.indices.tolist() == [[2], [0], [2]]
    assert routing.weights.tolist() == [[1.0]] * 3 and routing.weights.dtype == torch.float32


def test_gate_cross_entropy_counts_tokens_by_their_weights():
    logits = torch.tensor([[2.0, 0.0], [0.0, 5.0], [9.0, 0.0]])
    labels, weights = torch.tensor([0, 0, 0]), torch.tensor([0.5, 2.0, 0.0])
    loss, correct = gate_cross_entropy(logits, labels, weights)
    expected = -(torch.log_softmax(logits, -1)[:, 0] * weights).sum()
    torch.testing.assert_close(loss, expected)
    assert correct == 0.5
