"""All backends compute one sum, and its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora.backends import MIXERS, bmm, get_gated_mix, get_mix, resolve, triton
from meteora.backends.own import mix_own
from meteora.gating import Routing

NAMES = ["bmm", "dense", "loop"]  # in plain torch, and so in any dtype; the fourth is tested in test_kernels.py


def problem(ranks, tokens, k, *, features=5, out=4, seed=0, dtype=torch.float64, shuffle=False, x_stride=1):
    """Random operands; ``ranks[n]`` is adapter n's rank, 0 for one without columns."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    owner = torch.cat([torch.full((rank,), n) for n, rank in enumerate(ranks)])
    if shuffle:
        owner = owner[torch.randperm(len(owner), generator=generator)]
    indices = torch.rand(tokens, len(ranks), generator=generator).argsort(dim=1)[:, :k]
    weights = torch.softmax(torch.randn(tokens, k, generator=generator), -1)
    x = normal(tokens, features * x_stride)[:, ::x_stride]
    return (
        normal(tokens, out),
        x,
        normal(len(owner), features),
        normal(out, len(owner)),
        owner,
        Routing(indices, weights),
    )


def reference(y, x, A, B, owner, routing):
    """The definition, token by token and adapter by adapter."""
    rows = []
    for t in range(len(y)):
        row = y[t]
        for n, w in zip(routing.indices[t].tolist(), routing.weights[t], strict=True):
            row = row + w.to(y.dtype) * (B[:, owner == n] @ (A[owner == n] @ x[t]))
        rows.append(row)
    return torch.stack(rows) if rows else y


@pytest.mark.parametrize("backend", NAMES)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 6), st.data(), st.booleans(),
    st.integers(1, 2), st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_every_backend_is_the_definition(backend, ranks, tokens, data, shuffle, x_stride, seed):
    k = data.draw(st.integers(1, len(ranks)))
    y, *rest = problem(ranks, tokens, k, seed=seed, shuffle=shuffle, x_stride=x_stride)
    expected = reference(y.clone(), *rest)
    result = MIXERS[backend](y, *rest)
    torch.testing.assert_close(result, expected)
    assert result.data_ptr() == y.data_ptr() and torch.equal(result, y)  # in place, and returned


@pytest.mark.parametrize("backend", NAMES)
def test_an_adapter_without_columns_adds_zero_and_nothing_is_renormalised(backend):
    y, x, A, B, owner, routing = problem([2, 0], 3, 2)
    before = y.clone()
    alone = Routing(torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert torch.equal(MIXERS[backend](y.clone(), x, A, B, owner, alone), before)
    share = (routing.weights * (routing.indices == 0)).sum(1, keepdim=True).double()
    torch.testing.assert_close(MIXERS[backend](y, x, A, B, owner, routing) - before, share * (x @ A.T @ B.T))


@pytest.mark.parametrize("backend", NAMES)
def test_gradcheck(backend):
    y, x, A, B, owner, routing = problem([2, 1, 0, 3], 4, 2)
    inputs = [t.requires_grad_() for t in (y, x, A, B)]

    def run(y, x, A, B, weights):
        # weights are float32 by contract, so they are checked through the float64 ones below
        return MIXERS[backend](y.clone(), x, A, B, owner, Routing(routing.indices, weights))

    weights = routing.weights.double().requires_grad_()
    assert torch.autograd.gradcheck(run, (*inputs, weights))


def test_gradients_agree_in_float32():
    gradients = {}
    for name in NAMES:
        y, x, A, B, owner, routing = problem([3, 8, 0, 2], 9, 2, features=16, out=12, dtype=torch.float32)
        leaves = [t.requires_grad_() for t in (y, x, A, B, routing.weights)]
        result = MIXERS[name](y.clone(), x, A, B, owner, routing)
        gradients[name] = torch.autograd.grad(result.sin().sum(), leaves)
    for name in NAMES[1:]:
        torch.testing.assert_close(gradients[name], gradients[NAMES[0]], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float64(backend, dtype):
    y, *rest = problem([4, 2, 6], 16, 2, features=32, out=24, seed=5)
    expected = reference(y.clone(), *rest)
    y, x, A, B, owner, routing = problem([4, 2, 6], 16, 2, features=32, out=24, seed=5, dtype=dtype)
    result = MIXERS[backend](y, x, A, B, owner, routing)
    assert result.dtype == dtype
    error = (result.double() - expected).norm() / expected.norm()
    assert error < (0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token(backend, value):
    y, x, A, B, owner, routing = problem([2, 3, 1], 5, 2)
    clean = MIXERS[backend](y.clone(), x, A, B, owner, routing)
    x[2] = value
    result = MIXERS[backend](y, x, A, B, owner, routing)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(result[others], clean[others])
    assert not torch.isfinite(result[2]).any()


@pytest.mark.parametrize("backend", NAMES)
def test_an_adapter_that_overflows_is_felt_by_those_alone_who_chose_it(backend):
    y, x, A, B, owner, routing = (problem([2, 3, 1], 5, 1)[i] for i in range(6))
    first = Routing(torch.zeros_like(routing.indices), routing.weights)
    clean = MIXERS[backend](y.clone(), x, A, B, owner, first)
    A = A.masked_fill((owner == 1)[:, None], torch.inf)
    assert torch.equal(MIXERS[backend](y.clone(), x, A, B, owner, first), clean)


def test_bmm_asks_for_the_columns_once_for_a_layer_and_again_when_they_change(monkeypatch):
    asked = []
    find = bmm._kept.find
    monkeypatch.setattr(bmm._kept, "find", lambda owner: asked.append(len(owner)) or find(owner))
    y, x, A, B, owner, routing = problem([2, 3], 4, 1)
    for _ in range(2):
        torch.testing.assert_close(bmm.mix(y.clone(), x, A, B, owner, routing), reference(y, x, A, B, owner, routing))
    assert asked == [5]
    owner.copy_(owner.flip(0))
    torch.testing.assert_close(bmm.mix(y.clone(), x, A, B, owner, routing), reference(y, x, A, B, owner, routing))
    assert asked == [5, 5]
    kept = len(bmm._kept.found)
    del owner
    assert len(bmm._kept.found) == kept - 1


def test_bmm_says_that_it_cannot_begin_in_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(bmm, "_kept", lambda owner: None)
    with pytest.raises(RuntimeError, match="call the layer once before it is captured"):
        MIXERS["bmm"](*problem([2, 3], 4, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_bmm_fits_into_a_cuda_graph():
    y, x, A, B, owner, routing = problem([2, 0, 3], 4, 2, dtype=torch.float32)
    routing = Routing(routing.indices.cuda(), routing.weights.cuda())
    there = [t.cuda() for t in (y, x, A, B, owner)]
    bmm.mix(there[0].clone(), *there[1:], routing)  # finds the columns
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bmm.mix(*there, routing)
    graph.replay()
    here = Routing(routing.indices.cpu(), routing.weights.cpu())
    torch.testing.assert_close(there[0].cpu(), reference(y, x, A, B, owner, here), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["bmm", "dense"])
def test_a_compiled_mixture_is_one_graph(backend):
    torch.compiler.reset()
    _, _, A, B, owner, _ = problem([2, 0, 3], 1, 1, shuffle=True)

    def mixed(y, x, indices, weights):
        return MIXERS[backend](y * 1, x, A, B, owner, Routing(indices, weights))

    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        y, x, *_, routing = problem([2, 0, 3], tokens, 2, seed=tokens)
        trained = [x.requires_grad_(), routing.weights.double().requires_grad_()]
        results = [f(y, x, routing.indices, trained[1]) for f in (mixed, compiled)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(result.sum(), trained) for result in results))


def test_an_adapter_of_low_rank_does_not_feel_an_overflow_of_the_first():
    for backend in NAMES[:1] + NAMES[2:]:
        y, x, A, B, owner, _ = problem([3, 1], 2, 1)
        B[:, 0] = torch.inf
        second = Routing(torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1))
        assert MIXERS[backend](y, x, A, B, owner, second).isfinite().all(), backend


def test_own_adapters_are_a_routing_of_whole_samples():
    samples, tokens, adapters, rank = 4, 3, 3, 2
    y, x, A, B, owner, _ = problem([rank] * adapters, samples * tokens, 1)
    chosen = torch.tensor([2, 0, 2, 1])
    routing = Routing(chosen.repeat_interleave(tokens)[:, None], torch.ones(samples * tokens, 1))
    results = []
    for way in ("own", "given"):
        leaves = [t.clone().requires_grad_() for t in (y, x, A, B)]
        if way == "own":
            own = torch.nn.functional.one_hot(chosen, adapters).to(y.dtype).unsqueeze(1).expand(-1, tokens, -1)
            shaped = (t.unflatten(0, (samples, tokens)) for t in leaves[:2])
            out = mix_own(*shaped, *leaves[2:], own).flatten(0, 1)
        else:
            out = reference(*leaves, owner, routing)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_names():
    assert set(MIXERS) == {*NAMES, "triton"}
    assert get_mix("auto", "cpu") is MIXERS["dense"] and get_gated_mix("auto", "cpu") is None
    assert get_gated_mix("dense") is None
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        get_mix("fast")


def test_triton_wants_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="'triton' cannot run on 'cpu', as it needs a GPU; use 'auto', or set TRITON"):
        get_mix("triton", "cpu")
    assert resolve("auto", "cuda") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", "cpu") == "triton" and resolve("auto", "cpu") == "dense"


def test_auto_says_once_what_it_falls_back_to(monkeypatch, caplog):
    monkeypatch.setattr(triton, "INSTALLED", False)
    assert {resolve("auto", "cuda") for _ in range(3)} == {"dense"}
    assert [r.message for r in caplog.records] == ["backend 'auto' uses 'dense' on this GPU, as Triton is not installed."]
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        resolve("triton", "cuda")
