"""One layer: y = W x + sum_j w_j s_j B_j A_j x, whatever the input's shape, strides, type and values."""

import copy
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from meteora import MeteoraLinear
from meteora.adapters import LoraWeights
from meteora.kernels.segments import segments
from meteora.layer import ForcedAdapters, MixtureState
from meteora.siblings import link_siblings

PLAIN = ["loop", "bmm", "dense"]  # in plain torch, and so in any dtype
BACKENDS = [*PLAIN, *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]  # these layers are on the CPU

interpreted = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")


def make_layer(ranks, *, features=6, out=5, seed=0, dtype=torch.float32, base=None, **state):
    """A layer with random gate; ``ranks[n]`` is adapter n's rank, 0 for one that is not in this layer."""
    torch.manual_seed(seed)
    base = base or nn.Linear(features, out)
    adapters = {
        n: LoraWeights(torch.randn(rank, features), torch.randn(out, rank), 0.5 + n)
        for n, rank in enumerate(ranks)
        if rank
    }
    layer = MeteoraLinear(base.to(dtype), len(ranks), adapters, MixtureState(**{"top_k": 2, **state}), dtype=dtype)
    nn.init.normal_(layer.gate.weight)
    layer.base_layer.requires_grad_(False)
    return layer, adapters


def definition(layer, adapters, x):
    logits = x.double() @ layer.gate.weight.double().T
    values, indices = logits.topk(layer.state.top_k, dim=-1)
    weights = torch.softmax(values / layer.state.temperature, -1)
    y = x.double() @ layer.base_layer.weight.double().T + layer.base_layer.bias.double()
    for n, w in adapters.items():
        share = (weights * (indices == n)).sum(-1, keepdim=True)
        y = y + share * w.scaling * (x.double() @ w.A.double().T @ w.B.double().T)
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.data(), st.floats(0.2, 20), st.booleans(), st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_shape_and_stride(backend, ranks, shape, data, temperature, transposed, seed):
    k = data.draw(st.integers(1, len(ranks)))
    layer, adapters = make_layer(ranks, seed=seed, top_k=k, temperature=temperature, backend=backend)
    x = torch.randn(6, *shape).movedim(0, -1) if transposed else torch.randn(*shape, 6)
    before = x.clone()
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (*shape, 5) and torch.equal(x, before)
    torch.testing.assert_close(y.double(), definition(layer, adapters, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_choose_k_different_adapters(backend):
    layer, adapters = make_layer([2, 2, 2], backend=backend)
    nn.init.zeros_(layer.gate.weight)
    x = torch.randn(3, 6)
    ours = layer(x) - layer.base_layer(x)
    parts = {n: w.scaling * (x @ w.A.T @ w.B.T) for n, w in adapters.items()}
    pairs = [0.5 * (parts[a] + parts[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    for row in range(3):
        assert min((ours[row] - pair[row]).abs().max() for pair in pairs) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_token_stays_in_that_token(backend):
    layer, _ = make_layer([2, 1, 0], backend=backend)
    x = torch.randn(2, 4, 6)
    clean = layer(x)
    x[1, 2, 3] = torch.nan
    dirty = layer(x)
    other = torch.ones(2, 4, dtype=torch.bool)
    other[1, 2] = False
    torch.testing.assert_close(dirty[other], clean[other])
    assert torch.isnan(dirty[1, 2]).all()


@pytest.mark.parametrize("backend", PLAIN)
def test_gradcheck_of_inputs_and_gate(backend):
    layer, _ = make_layer([2, 1, 3], backend=backend, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        assert (layer.gate(x.float()).sort().values.diff().abs() > 1e-2).all()  # no choice may flip

    def run(x):
        return layer(x)

    # The logits are float32 by contract: enough to check the derivative, with a coarser step.
    assert torch.autograd.gradcheck(run, (x,), eps=1e-3, atol=2e-2, rtol=2e-2)


def test_all_backends_give_the_gate_and_the_input_the_same_gradients():
    results = []
    for backend in BACKENDS:
        layer, _ = make_layer([2, 4, 0, 1], backend=backend, top_k=3)
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), [x, layer.gate.weight])))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
    assert results[0][2].abs().max() > 0


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_base_layers_type(backend, dtype):
    layer, adapters = make_layer([2, 4], backend=backend, dtype=dtype)
    x = torch.randn(5, 6).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).double(), definition(layer, adapters, x), rtol=0.1, atol=0.3)


class Int8Linear(nn.Linear):
    """A stand-in for a quantised layer: its weight is integer, and it computes and answers in its input's type."""

    def __init__(self, features, out):
        super().__init__(features, out)
        self.weight = nn.Parameter(torch.randint(-4, 5, (out, features)).to(torch.int8), requires_grad=False)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_quantised_base_layer_is_only_called(backend, autocast):
    torch.manual_seed(0)
    layer, adapters = make_layer([2, 3], backend=backend)
    layer.base_layer = Int8Linear(6, 5)
    x = torch.randn(4, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), definition(layer, adapters, x), rtol=1e-4, atol=1e-4)


def test_disabled_is_the_base_layer_bitwise():
    layer, _ = make_layer([2, 3], enabled=False)
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias


def test_forced_adapters_are_one_a_sample():
    layer, adapters = make_layer([2, 0, 3])
    x = torch.randn(3, 4, 6)
    layer.state.forced = ForcedAdapters([2, 1, 0], one_for_all=False)
    update = layer(x) - layer.base_layer(x)
    for row, n in enumerate([2, None, 0]):
        w = adapters.get(n)
        expected = torch.zeros(4, 5) if w is None else w.scaling * (x[row] @ w.A.T @ w.B.T)
        torch.testing.assert_close(update[row], expected, atol=1e-5, rtol=1e-4)
    for wrong in (x[:2], torch.randn(6, 4, 6)):
        with pytest.raises(ValueError, match="route_to got 3 names, one per sample, but the input has shape"):
            layer(wrong)
    with pytest.raises(ValueError, match="3 names, one per sample, but a layer gets the tokens of all samples in one row, "):
        layer(x.flatten(0, 1))


def test_an_added_adapter_is_a_zero_row_and_more_columns():
    layer, adapters = make_layer([2, 3], top_k=1)
    x = torch.randn(5, 6)
    rows = layer.gate.weight.detach().clone()
    layer.add_adapter(LoraWeights(torch.randn(4, 6), torch.randn(5, 4), 3.0))
    layer.add_adapter(None)
    assert layer.gate.out_features == 4 and layer.gate.weight.requires_grad
    assert torch.equal(layer.gate.weight[:2], rows) and not layer.gate.weight[2:].any()
    assert layer.column_adapter.tolist() == [0] * 2 + [1] * 3 + [2] * 4
    layer.state.forced = ForcedAdapters([0], one_for_all=True)
    w = adapters[0]
    torch.testing.assert_close(layer(x) - layer.base_layer(x), w.scaling * (x @ w.A.T @ w.B.T), atol=1e-5, rtol=1e-4)


@interpreted
def test_triton_refuses_what_it_would_compute_wrongly():
    for dtype, match in ((torch.float64, "float32, float16 or bfloat16"), (torch.bfloat16, "interpreter")):
        layer, _ = make_layer([2, 4], backend="triton", dtype=dtype)
        with pytest.raises(ValueError, match=match):
            layer(torch.randn(3, 6, dtype=dtype))


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "gate.weight", "base_layer.weight", "base_layer.bias"])
def test_weights_are_found_wherever_a_module_keeps_them(name):
    layer, _ = make_layer([2, 3])
    expected = (layer.lora_A, layer.lora_B, layer.gate.weight, layer.base_layer.weight, layer.base_layer.bias)
    assert all(a is b for a, b in zip(layer.weights(), expected, strict=True))
    parent, _, child = name.rpartition(".")
    module = layer.get_submodule(parent)
    vars(module)[child] = module._parameters.pop(child).detach()
    assert all(torch.equal(a, b) for a, b in zip(layer.weights(), expected, strict=True))
    assert next(iter(set(map(id, layer.weights())) - set(map(id, expected)))) == id(vars(module)[child])


@interpreted
def test_triton_refuses_more_adapters_than_a_program_holds():
    layer, _ = make_layer([1] * 1100, features=4, out=3, backend="triton", top_k=1)
    with pytest.raises(ValueError, match="chooses among 1024 adapters at most, not 1100; use 'dense'"), torch.no_grad():
        layer(torch.randn(2, 4))
    assert segments(layer.column_adapter) is None


@interpreted
def test_packed_weights_follow_the_weights():
    layer, adapters = make_layer([2, 4], backend="triton")
    x = torch.randn(5, 6)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(layer(x).double(), definition(layer, adapters, x), rtol=1e-3, atol=1e-4)
        assert layer.lora_A.data_ptr() == layer._packed.data_ptr(), "A is kept twice"

    check()
    with torch.no_grad():
        layer.gate.weight.add_(torch.randn_like(layer.gate.weight))
    check()
    layer.gate.weight = nn.Parameter(torch.randn(2, 6))
    check()
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.gate.weight.neg_()
    assert not torch.equal(copied(x), layer(x))
    check()
    adapters[2] = LoraWeights(torch.randn(3, 6), torch.randn(5, 3), 1.5)
    layer.add_adapter(adapters[2])
    check()
    assert torch.equal(layer.state_dict()["lora_A"], layer.lora_A)


@interpreted
def test_weights_packed_for_inference_can_be_trained_through():
    layer, adapters = make_layer([2, 4], backend="triton")
    x = torch.randn(5, 6)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    expected = definition(layer, adapters, x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), layer.gate.weight)
    torch.testing.assert_close(layer.gate.weight.grad, expected_gradient.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_hook_on_the_base_layer_keeps_what_it_was_given(backend, gradients):
    layer, adapters = make_layer([3, 2], backend=backend)
    given = []
    layer.base_layer.register_forward_hook(lambda module, inputs, y: given.append(y))
    x = torch.randn(2, 3, 6, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        y = layer(x)
        torch.testing.assert_close(y.double(), definition(layer, adapters, x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(given[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))
        if gradients:
            (y.sum() + given[0].sum()).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_hook_on_the_base_layer_sees_its_gradient(backend):
    layer, adapters = make_layer([3, 2], backend=backend)
    seen = []
    layer.base_layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    x = torch.randn(2, 3, 6, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y.double(), definition(layer, adapters, x), rtol=1e-3, atol=1e-4)
    y.sum().backward()
    assert torch.equal(seen[0], torch.ones_like(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_route_to_serves_passes_with_and_without_inference_mode(backend):
    layer, adapters = make_layer([3, 2], backend=backend)
    layer.state.forced = ForcedAdapters([1], one_for_all=True)
    x = torch.randn(2, 3, 6)
    with torch.inference_mode():
        expected = layer(x)
    given = x.clone().requires_grad_()
    y = layer(given)
    torch.testing.assert_close(y, expected.clone())
    y.sum().backward()
    assert given.grad is not None


@interpreted
def test_a_fake_pass_leaves_the_weights_as_they_are():
    layer, adapters = make_layer([3, 2], backend="triton")
    x = torch.randn(4, 6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert layer(mode.from_tensor(x)).shape == (4, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), definition(layer, adapters, x), rtol=1e-3, atol=1e-4)


@interpreted
@pytest.mark.parametrize("gradients", [False, True])
def test_forward_mode_is_refused_rather_than_wrong(gradients):
    """Also of a layer that is linked, whose pass without gradients is another."""
    layer, adapters = make_layer([3, 2], backend="triton")
    link_siblings({"block.q_proj": layer})
    x, tangent = torch.randn(4, 6), torch.randn(4, 6)
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative; use 'dense'"):
            layer(dual)
        layer.state.backend = "dense"
        found = forward_ad.unpack_dual(layer(dual)).tangent
    expected = torch.autograd.functional.jvp(lambda x: definition(layer, adapters, x), (x,), (tangent,))[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@interpreted
def test_second_derivatives_are_refused_rather_than_wrong():
    layer, _ = make_layer([3, 2], backend="triton")
    layer.lora_B.requires_grad_(True)
    x = torch.randn(4, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).pow(2).sum(), layer.lora_B, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.pow(2).sum().backward()


@interpreted
def test_copies_and_pickles_carry_no_packed_weights():
    layer, adapters = make_layer([3, 2], backend="triton")
    before = len(pickle.dumps(layer))
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = layer(x)
        assert layer._packed is not None
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other._packed is None
            torch.testing.assert_close(other(x), expected)
    copied = copy.deepcopy(layer)
    assert copied.lora_A.untyped_storage().nbytes() < layer._packed.untyped_storage().nbytes()
    assert len(pickle.dumps(copied)) < before + 1000
