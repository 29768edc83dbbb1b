"""The Triton kernels compute what their plain-torch references do: on a GPU if there is one, else interpreted."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

from meteora.backends import MIXERS
from meteora.backends import triton as backend
from meteora.gating import Routing
from meteora.kernels import (
    choose,
    decode,
    expand,
    gathered,
    grouped,
    grouped_training,
    launch,
    listed,
    ops,
    route,
    shrink,
    sort,
    tiles,
)
from meteora.kernels.packing import gate_parts, pack, padded
from meteora.kernels.segments import segments

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter multiplies no bfloat16 matrices.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NAMES = ("y", "x", "A", "B", "gate")
UNSURE = 0.9  # of a softmax: what the chosen must have
LEAST = st.sampled_from([0.0, 0.3, 0.7, 0.99])
# Up to 64 tokens most kernels run a program for each of them, in a loop over the k that they chose.
TOKENS = st.integers(1, 70) if CUDA else st.one_of(st.integers(1, 16), st.sampled_from([17, 33, 65, 70]))
RANKS = st.lists(st.integers(0, 20), min_size=1, max_size=12) if CUDA else st.lists(st.integers(0, 40), min_size=1, max_size=6)
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def sized(real, interpreted):
    """What a GPU is given, or the interpreter: enough for all paths, as each step of each program takes it a while."""
    return real if CUDA else interpreted


def in_dtypes(shapes, *halved):
    """Every shape with every dtype; interpreted, with float16 those alone that ``halved`` numbers."""
    return [
        (*shape, dtype)
        for dtype in DTYPES for number, shape in enumerate(shapes)
        if CUDA or dtype == torch.float32 or number in halved
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so whatever a kernel fails to write is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


def problem(tokens, features, out, ranks, dtype=torch.float32, seed=0, shuffle=False):
    """y, x, A, B, gate and column_adapter; ``ranks[n]`` is adapter n's rank, 0 for one without columns."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    owner = torch.cat([torch.full((rank,), n) for n, rank in enumerate(ranks)])
    if shuffle:
        owner = owner[torch.randperm(len(owner), generator=generator)]
    R = len(owner)
    A, B = normal(R, features) / features**0.5, normal(out, R) / max(R, 1) ** 0.5
    gate = torch.randn(len(ranks), features, generator=generator).to(DEVICE)
    return normal(tokens, out), normal(tokens, features), A, B, gate, owner.to(DEVICE)


def routing_of(tokens, adapters, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, adapters, generator=generator).argsort(1)[:, :k]
    return indices.to(DEVICE), torch.softmax(torch.randn(tokens, k, generator=generator), -1).to(DEVICE)


def close(actual, expected, dtype=torch.float32, slack=1.0):
    """Equal up to ``dtype``'s rounding, relative to the whole tensor's norm."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape and torch.isfinite(actual).all()
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error <= slack * TOLERANCE[dtype], f"relative error {error:.1e}"


SHAPES = [
    # tokens, features, out, ranks, k
    (1, 48, 40, [8] * 4, 2),
    (3, 17, 65, [1, 0, 128, 5], 2),
    (16, 257, 33, [3, 7], 1),
    (33, 64, 130, [8] * 28, 2),
    (sized(20, 17), sized(300, 130), 40, [64] * 9, 2),  # more than 512 columns
    (sized(70, 66), 130, 16, [2] * 5, 5),
    (130, 64, 72, [16, 8, 4], 2),
    (sized(5, 2), 40, sized(24, 17), [1] * 256, 256),
    (9, 32, 24, [64] * 9, 3),
]


@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(SHAPES, 1, 2, 3, 5))
def test_gated_mix_is_the_reference(tokens, features, out, ranks, k, dtype):
    y, x, A, B, gate, owner = problem(tokens, features, out, ranks, dtype)
    for least in (UNSURE, 0.0):
        expected = ops.gated_mix_ref(y.float(), x.float(), A.float(), B.float(), gate, owner, k, 1.5, least_share=least)
        target = y.clone()
        result = ops.gated_mix_(target, x, pack(A, gate), B, owner, len(ranks), k, 1.5, least_share=least)
        assert result.data_ptr() == target.data_ptr()
        close(result, expected, dtype)


@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(SHAPES[1:7], 0, 2, 4))
def test_every_gradient_of_gated_mix(tokens, features, out, ranks, k, dtype):
    *operands, owner = problem(tokens, features, out, ranks, dtype, shuffle=True)
    leaves = [t.clone().requires_grad_() for t in operands]
    exact = [t.clone().float().requires_grad_() for t in operands]
    packed = pack(operands[2], operands[4])
    upstream = torch.randn(tokens, out, device=DEVICE)
    result = ops.gated_mix(*leaves, packed, owner, k, 0.7, UNSURE)[0]
    result.backward(upstream.to(dtype))
    ops.gated_mix_ref(*exact, owner, k, 0.7, least_share=UNSURE).backward(upstream)
    for name, leaf, reference in zip(NAMES, leaves, exact, strict=True):
        if name == "gate" and k == 1:
            assert torch.equal(leaf.grad, torch.zeros_like(leaf)), "one choice has the weight 1 whatever its logit"
        else:
            close(leaf.grad, reference.grad, dtype, slack=3)


@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(SHAPES[1:7], 0, 2, 4))
def test_every_gradient_of_a_given_routing(tokens, features, out, ranks, k, dtype):
    y, x, A, B, _, owner = problem(tokens, features, out, ranks, dtype)
    indices, weights = routing_of(tokens, len(ranks), k)
    leaves = [t.clone().requires_grad_() for t in (y, x, A, B, weights)]
    exact = [t.clone().float().requires_grad_() for t in (y, x, A, B, weights)]
    upstream = torch.randn(tokens, out, device=DEVICE)
    backend.mix(*leaves[:4], owner, Routing(indices, leaves[4])).backward(upstream.to(dtype))
    ops.mix_ref(*exact[:4], owner, indices, exact[4]).backward(upstream)
    for name, leaf, reference in zip((*NAMES[:4], "weights"), leaves, exact, strict=True):
        close(leaf.grad, reference.grad, dtype, slack=3)
    with torch.no_grad():
        expected = ops.mix_ref(*exact[:4], owner, indices, weights)
        close(backend.mix(y.clone(), x, A, B, owner, Routing(indices, weights)), expected, dtype)


@given(
    TOKENS, st.integers(1, 70), st.integers(1, 70), RANKS, st.data(), st.floats(0.2, 20), st.booleans(), st.booleans(), LEAST,
    st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=sized(30, 20), deadline=None)
def test_any_shape(tokens, features, out, ranks, data, temperature, shuffle, absolute, least, seed):
    k = data.draw(st.integers(1, len(ranks)))
    y, x, A, B, gate, owner = problem(tokens, features, out, ranks, seed=seed, shuffle=shuffle)
    options = {"absolute": absolute, "least_share": least}
    expected = ops.gated_mix_ref(y, x, A, B, gate, owner, k, temperature, **options)
    close(ops.gated_mix_(y, x, pack(A, gate), B, owner, len(ranks), k, temperature, **options), expected)


def siblings_of(tokens, features, outs, ranks, dtype=torch.float32, seed=0, shuffle=False):
    """ys, x, As, Bs, gates and column_adapter of layers that get one input."""
    found = [problem(tokens, features, out, ranks, dtype, seed + n, shuffle) for n, out in enumerate(outs)]
    ys, _, As, Bs, gates, _ = zip(*found, strict=True)
    owner = problem(0, 1, 1, ranks, seed=seed, shuffle=shuffle)[-1]
    return ys, found[0][1], As, Bs, gates, owner


def check_siblings(operands, k, temperature, dtype, *, absolute=False, least=0.0, early=True):
    """As the reference, and, up to where cuBLAS multiplies, to the bit what each layer gets for itself."""
    ys, x, As, Bs, gates, owner = operands
    N, options, widest = len(gates[0]), {"absolute": absolute, "least_share": least}, max(map(len, Bs))
    packs, expected, alone = [pack(*each) for each in zip(As, gates, strict=True)], [], []
    for y, A, B, gate, packed in zip(ys, As, Bs, gates, packs, strict=True):
        exact = [t.float() for t in (y, x, A, B)]
        expected.append(ops.gated_mix_ref(*exact, gate, owner, k, temperature, **options))
        alone.append(ops.gated_mix_(y.clone(), x, packed, B, owner, N, k, temperature, **options, widest=widest))
    chosen = ops.choose_siblings(x, torch.cat(packs), len(Bs), widest, owner, N, k, temperature, **options)
    ops.add_siblings(ys, chosen, Bs, owner, N, k, temperature, **options, early=early)
    for y, reference, result in zip(ys, expected, alone, strict=True):
        close(y, reference, dtype)
        assert torch.equal(y, result) or len(x) > shrink.FEW_TOKENS


SIBLINGS = [
    # tokens, features, outs, ranks, k
    (1, 48, (40, 17, 33), [8] * 4, 2),
    (3, 1100, (64, 64), [8] * sized(28, 17), 2),  # sums in several pieces, C no multiple of a tile's columns
    (4, 40, (4097, 16, 1), [1, 0, 7], 2),  # `decode` for the narrow ones alone
    (17, 700, (1, 130, 65), [5, 0, 12], 3),
    (64, 64, (70,), [8] * 9, 1),
    (sized(130, 66), 64, (72, 16, 16), [16, 8, 4], 2),
    (sized(90, 65), sized(300, 40), (40, 24), [1] * 20, sized(20, 9)),
]


@pytest.mark.parametrize("tokens, features, outs, ranks, k, dtype", in_dtypes(SIBLINGS, 0, 1, 5))
@pytest.mark.parametrize("early", sized([True, False], [False]))  # others say True, which the interpreter takes alike
def test_siblings(tokens, features, outs, ranks, k, early, dtype):
    check_siblings(siblings_of(tokens, features, outs, ranks, dtype), k, 1.5, dtype, early=early)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_narrow_sibling_alone_is_cut_as_beside_a_wide_one(dtype, monkeypatch):
    monkeypatch.setattr(expand, "WIDE", 64)
    check_siblings(siblings_of(20, 40, (130, 20), [8] * 28, dtype), 2, 1.5, dtype)


@given(
    TOKENS, st.integers(1, 70), st.lists(st.integers(1, 70), min_size=1, max_size=3), RANKS.filter(any), st.data(),
    st.floats(0.2, 20), st.booleans(), st.booleans(), LEAST, st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=sized(20, 12), deadline=None)
def test_siblings_of_any_shape(tokens, features, outs, ranks, data, temperature, shuffle, absolute, least, seed):
    k = data.draw(st.integers(1, len(ranks)))
    operands = siblings_of(tokens, features, outs, ranks, seed=seed, shuffle=shuffle)
    check_siblings(operands, k, temperature, torch.float32, absolute=absolute, least=least)


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 8, 40, 600])
@pytest.mark.parametrize("outs", [(4096, 1024, 1024), (4096,)])
def test_siblings_in_a_graph(tokens, outs):
    """There the kernels of one layer after the other are branches, of the inputs that are there when it is replayed."""
    found = [siblings_of(tokens, features, outs, [8] * 28, torch.bfloat16, seed=features) for features in (512, 4096)]
    packs = [torch.cat([pack(*each) for each in zip(As, gates, strict=True)]) for _, _, As, _, gates, _ in found]
    weights = [[torch.randn(out, x.shape[1], device=DEVICE, dtype=x.dtype) for out in outs] for _, x, *_ in found]

    def step():
        results = []
        for (_, x, _, Bs, _, owner), packed, Ws in zip(found, packs, weights, strict=True):
            base = lambda x=x, Ws=Ws: [x @ W.t() for W in Ws]
            results += backend.gated_mixes(base, x, packed, Bs, owner, 28, 2, 1.0, absolute=False, least_share=0.0)
        return results

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for _ in range(20):
        for _, x, *_ in found:
            x.normal_()
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(replayed, step(), strict=True))


@pytest.mark.parametrize(
    "tokens, features, columns", [(1, 33, 20), (16, 512, 48), (17, 700, 40), (130, 96, 70), (90, 1100, 50)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink(tokens, features, columns, dtype):
    x = torch.randn(tokens, features, device=DEVICE).to(dtype)
    W = torch.randn(columns, features, device=DEVICE).to(dtype)
    close(shrink.shrink(x, W).sum(0), shrink.shrink_ref(x, W)[0], dtype)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("least", [0.0, 0.95])
def test_route_and_its_way_back(splits, parts, least):
    dtype = torch.float32 if parts == 1 else torch.float16
    assert gate_parts(dtype) == parts
    ranks, k, tokens = [8, 0, 3, 5, 1], 3, sized(37, 18)
    owner = torch.cat([torch.full((rank,), n) for n, rank in enumerate(ranks)]).to(DEVICE)
    R, N = len(owner), len(ranks)
    products = torch.randn(splits, tokens, padded(R + parts * N), device=DEVICE)
    s, raw, indices, weights = route.route(products, owner, N, k, 0.5, least_share=least, dtype=dtype, keep=True)
    wanted = route.route_ref(products, owner, N, k, 0.5, least_share=least, parts=parts)
    assert 0 < (wanted[3].sum(1) == 0).sum() < tokens or not least
    assert torch.equal(indices.long(), wanted[2])
    close(weights, wanted[3])
    for actual, expected in ((s, wanted[0]), (raw, wanted[1])):
        assert actual.shape == (tokens, padded(R))
        close(actual[:, :R], expected, dtype)
    close(route.mask(products, owner, indices, weights, dtype=dtype)[0][:, :R], wanted[0], dtype)

    ds = torch.randn(tokens, R, device=DEVICE).to(dtype)
    gradient, none = route.route_backward(ds, raw, owner, indices, weights, N, 0.5)
    weighted, dlogits, dweights = route.route_backward_ref(ds, raw[:, :R], owner, indices, weights, N, 0.5)
    assert gradient.shape == (tokens, padded(R + N)) and none.numel() == 0
    close(gradient[:, :R], weighted, dtype)
    close(gradient[:, R : R + N], dlogits, dtype)
    assert not gradient[:, R + N :].any()
    gradient, given_weights = route.route_backward(ds, raw, owner, indices, weights)
    close(gradient, weighted, dtype)
    close(given_weights, dweights)


@pytest.mark.parametrize("tokens, out, R", [(1, 17, 5), (20, 70, 24), (70, 130, 250), (520, 130, 5)])  # the last in two groups
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand(tokens, out, R, dtype):
    y, s = torch.randn(tokens, out, device=DEVICE).to(dtype), torch.randn(tokens, padded(R), device=DEVICE).to(dtype)
    B = torch.randn(out, R, device=DEVICE).to(dtype)
    result, expected = torch.empty_like(y), expand.expand_ref(y, s[:, :R], B)
    expand.expand([y], s, [B], [result])
    close(result, expected, dtype)


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("least", [0.0, 0.9])
def test_decode(splits, dtype, least):
    ranks = [8, 3, 0, 8]
    y, x, A, B, gate, owner = problem(3, 40, 50, ranks, dtype)
    packed = pack(A, gate)
    products = torch.randn(splits, 3, len(packed), device=DEVICE)
    expected = decode.decode_ref(y, products, B, owner, len(ranks), 2, 2.0, least_share=least)
    decode.decode([y], products, [B], owner, len(ranks), 2, 2.0, least_share=least)
    close(y, expected, dtype)


def test_packed_gates_are_nearly_float32():
    gate = torch.randn(5, 300, device=DEVICE)
    for dtype, bits in ((torch.float32, 30), (torch.float16, 18), (torch.bfloat16, 15)):
        A = torch.randn(3, 300, device=DEVICE).to(dtype)
        packed, parts = pack(A, gate), gate_parts(dtype)
        assert packed.dtype == dtype and len(packed) % 16 == 0 and torch.equal(packed[:3], A)
        kept = packed[3 : 3 + 5 * parts].double().unflatten(0, (parts, 5)).sum(0)
        assert ((kept - gate).abs() <= gate.abs() * 2.0**-bits + 1e-7 * (dtype == torch.float16)).all()
        assert not packed[3 + 5 * parts :].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [5, 40])
def test_what_is_not_finite_stays_in_its_token(value, tokens):
    y, x, A, B, gate, owner = problem(tokens, 24, 20, [2, 3, 1, 8])
    packed = pack(A, gate)
    clean = ops.gated_mix_(y.clone(), x, packed, B, owner, 4, 2)
    x[2] = value
    result = ops.gated_mix_(y, x, packed, B, owner, 4, 2)
    others = torch.arange(tokens, device=DEVICE) != 2
    assert torch.equal(result[others], clean[others])
    assert torch.isnan(result[2]).all()


@pytest.mark.parametrize("large", [6e4, torch.inf])
@pytest.mark.parametrize("tokens", [6, 20])
def test_an_adapter_that_overflows_is_not_felt_unless_chosen(tokens, large):
    y, x, A, B, gate, owner = problem(tokens, 16, 20, [4, 4], torch.float16)
    A[owner == 1] = large
    gate[0], gate[1] = x[0].float(), -x[0].float()
    x[:] = x[0]
    expected = ops.gated_mix_ref(y.float(), x.float(), A.float(), B.float(), gate, owner, 1)
    close(ops.gated_mix_(y, x, pack(A, gate), B, owner, 2, 1), expected, torch.float16)


def test_no_tokens_and_no_columns():
    for tokens, ranks in ((0, [2, 2]), (4, [0, 0])):
        y, x, A, B, gate, owner = problem(tokens, 8, 6, ranks)
        before, packed = y.clone(), pack(A, gate)
        leaves = [t.clone().requires_grad_() for t in (y, x, A, B, gate)]
        assert torch.equal(ops.gated_mix_(y, x, packed, B, owner, 2, 1), before)
        result = ops.gated_mix(*leaves, packed, owner, 1, 1.0, 0.0)[0]
        assert torch.equal(result, before)
        result.sum().backward()
        assert not any(leaf.grad.any() for leaf in leaves[1:])
        indices, weights = routing_of(tokens, 2, 1)
        leaves = [t.detach().clone().requires_grad_() for t in (y, x, A, B, weights)]
        result = ops.mix(*leaves[:4], owner, indices, leaves[4])[0]
        result.sum().backward()
        assert torch.equal(result, before) and not any(leaf.grad.any() for leaf in leaves[1:])


@pytest.mark.parametrize("tokens", [2, 30, 130])
def test_strided_inputs(tokens):
    y, x, A, B, gate, owner = problem(tokens, 48, 40, [4, 8])
    packed = pack(A, gate)
    expected = ops.gated_mix_ref(y, x, A, B, gate, owner, 2)
    wide = torch.zeros(tokens, 100, device=DEVICE)
    wide[:, 3:51] = x
    for strided in (wide[:, 3:51], x.t().contiguous().t()):
        assert not strided.is_contiguous() or tokens == 1
        close(ops.gated_mix_(y.clone(), strided, packed, B, owner, 2, 2), expected)


def test_the_same_twice():
    y, x, A, B, gate, owner = problem(40, 600, 40, [8] * 20)
    packed = pack(A, gate)
    first = ops.gated_mix_(y.clone(), x, packed, B, owner, 20, 2)
    assert torch.equal(first, ops.gated_mix_(y.clone(), x, packed, B, owner, 20, 2))


def test_opcheck():
    tokens = sized(8, 3)
    y, x, A, B, gate, owner = problem(tokens, 16, 16, [4, 4, 4])
    packed = pack(A, gate)
    indices, weights = routing_of(tokens, 3, 2)
    operators = torch.ops.meteora
    torch.library.opcheck(operators.gated_mix_, (y, x, packed, B, owner, 3, 2, 1.0, False, 0.5, 0))
    torch.library.opcheck(operators.mix_, (y, x, A, B, owner, indices, weights))
    leaves = [t.requires_grad_() for t in (y, x, A, B, gate)]
    torch.library.opcheck(operators.gated_mix, (*leaves, packed, owner, 2, 1.0, 0.5))
    torch.library.opcheck(operators.mix, (*leaves[:4], owner, indices, weights.requires_grad_()))


def test_operands_may_lie_in_any_order_but_what_is_added_to():
    y, x, A, B, gate, owner = problem(8, 16, 20, [4, 4, 4])
    indices, weights = routing_of(8, 3, 2)
    other_a, other_b = (t.t().contiguous().t() for t in (A, B))
    assert other_a.stride(-1) != 1 and other_b.stride(-1) != 1
    chosen, given = ops.gated_mix_ref(y, x, A, B, gate, owner, 2), ops.mix_ref(y, x, A, B, owner, indices, weights)
    packed = pack(other_a, gate)
    across = y.t().contiguous().t()
    close(ops.gated_mix_(y.clone(), x, packed.t().contiguous().t(), other_b, owner, 3, 2), chosen)
    close(ops.gated_mix(across, x, other_a, other_b, gate, packed, owner, 2, 1.0, 0.0)[0], chosen)
    close(ops.mix_(y.clone(), x, other_a, other_b, owner, indices, weights), given)
    close(ops.mix(across, x, other_a, other_b, owner, indices, weights)[0], given)
    for call in (
        lambda: ops.gated_mix_(across, x, packed, B, owner, 3, 2), lambda: ops.mix_(across, x, A, B, owner, indices, weights)
    ):
        with pytest.raises(ValueError, match=r"y has the strides \(1, 8\), but its rows must be dense"):
            call()
    with pytest.raises(ValueError, match=r"so its rows overlap"):
        ops.mix_(y[0].expand_as(y), x, A, B, owner, indices, weights)
    leaves = [t.requires_grad_() for t in (across, x, other_a, other_b, gate)]
    torch.library.opcheck(torch.ops.meteora.gated_mix, (*leaves, packed.detach(), owner, 2, 1.0, 0.0))
    torch.library.opcheck(torch.ops.meteora.mix, (*leaves[:4], owner, indices, weights))


def test_kernels_overlap_on_nvidias_gpus_alone(monkeypatch):
    """AMD's report capabilities as high, and have no such instruction."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    for version, overlap in ((None, True), ("6.4", False)):
        monkeypatch.setattr(torch.version, "hip", version)
        assert launch._hopper.__wrapped__(0) == overlap


def test_compiled_into_one_graph():
    y, x, A, B, gate, owner = problem(8, 16, 16, [4, 4, 4])
    packed = pack(A, gate)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def inference(y, x):
        return ops.gated_mix_(y * 2, x, packed, B, owner, 3, 2) + 1

    close(inference(y, x), ops.gated_mix_ref(y * 2, x, A, B, gate, owner, 2) + 1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def training(y, x, gate):
        return backend.gated_mix(y, x, A, B, gate, owner, 2).sin().sum()

    gradients = []
    for loss in (training, lambda y, x, gate: ops.gated_mix_ref(y, x, A, B, gate, owner, 2).sin().sum()):
        leaves = [t.clone().requires_grad_() for t in (y, x, gate)]
        gradients.append(torch.autograd.grad(loss(*leaves), leaves))
    for actual, expected in zip(*gradients, strict=True):
        close(actual, expected)


def test_compiled_once_for_all_numbers_of_tokens():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    @torch.compile(fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=counting, bw_compiler=counting))
    def given(y, x, A, B, owner, indices, weights):
        return ops.mix(y, x, A, B, owner, indices, weights)[0].sin()

    @torch.compile(fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=counting, bw_compiler=counting))
    def chosen(y, x, A, B, gate, packed, owner):
        return ops.gated_mix(y, x, A, B, gate, packed, owner, 2, 1.0, 0.0)[0].sin()

    for tokens in sized((8, 24, 40), (5, 9, 17)):
        y, x, A, B, gate, owner = problem(tokens, 16, 16, [4, 4, 4])
        routing, packed = routing_of(tokens, 3, 2), pack(A, gate)
        leaves = [t.clone().requires_grad_() for t in (y, x, A, B, gate)]
        for result, expected in (
            (given(*leaves[:4], owner, *routing), ops.mix_ref(*leaves[:4], owner, *routing).sin()),
            (chosen(*leaves, packed, owner), ops.gated_mix_ref(*leaves, owner, 2).sin()),
        ):
            close(result, expected)
            gradients = (torch.autograd.grad(r.sum(), leaves[:4]) for r in (result, expected))
            for actual, wanted in zip(*gradients, strict=True):
                close(actual, wanted)
    assert len(graphs) == 4  # forward and backward of each


@needs_gpu
def test_captured_in_a_graph():
    y, x, A, B, gate, owner = problem(300, 512, 256, [8] * 28, torch.bfloat16)
    packed = pack(A, gate)
    ops.gated_mix_(y.clone(), x, packed, B, owner, 28, 2)
    out, graph = y.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gated_mix_(out, x, packed, B, owner, 28, 2)
    x.copy_(torch.randn_like(x))
    out.copy_(y)
    graph.replay()
    assert torch.equal(out, ops.gated_mix_(y.clone(), x, packed, B, owner, 28, 2))


@needs_gpu
def test_offsets_beyond_32_bits():
    tokens, out = 2**18 + 3, 2**13
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB on the GPU")
    y, x, A, B, gate, owner = problem(8, 64, out, [8, 8], torch.bfloat16)
    x, y = x.repeat(tokens // 8 + 1, 1)[:tokens], torch.zeros(tokens, out, device=DEVICE, dtype=torch.bfloat16)
    ops.gated_mix_(y, x, pack(A, gate), B, owner, 2, 2)
    assert torch.equal(y[-3:], y[(tokens - 3) % 8 :][:3]) and y[-3:].any()  # the rows of x repeat


# Many columns: tokens sorted by adapter ------------------------------------------------------------------------------

GROUPED = [
    # tokens, features, out, ranks, k
    (1, 16, 16, [16], 1),
    (70, 33, 65, [5, 1, 0, 40, 3], 3),  # nothing is a multiple of anything
    (sized(150, 70), sized(72, 64), 136, [8, 0, 16, 8, 0], 2),  # aligned segments; the last adapter is unknown to them
    (130, 1100, 40, [64, 64], 1),  # the inner dimension in pieces
    (20, 40, 24, [1] * sized(70, 65), 2),  # so many adapters that a block has fewer tokens
    (20, 24, 20, [150, 3], 2),  # a rank of several tiles
]


def tiles_of(indices, found, height, slots=None):
    return sort.sort(indices, choose.count(indices, found.count)[0], found.starts, height, slots)


def assert_lists(lists, counts):
    slots, adapters = choose.list_ref(counts.cpu(), lists.adapters.shape[1])
    assert torch.equal(lists.slots.cpu(), slots)
    assert torch.equal(torch.where(adapters >= 0, lists.adapters.cpu(), -1), adapters)


def on_cpu(sorted_tiles):
    return sort.Tiles(*(part.cpu() for part in sorted_tiles[:3]), sorted_tiles.height)


@given(
    st.integers(1, 150), st.lists(st.integers(0, 3), min_size=1, max_size=70).filter(any), st.data(),
    st.sampled_from([16, 64]), st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=sized(25, 20), deadline=None)
def test_every_token_is_sorted_into_its_adapters_tiles(tokens, ranks, data, height, seed):
    k = data.draw(st.integers(1, min(3, len(ranks))))
    owner = torch.cat([torch.full((rank,), n) for n, rank in enumerate(ranks)]).to(DEVICE)
    found = segments(owner)
    indices = routing_of(tokens, len(ranks), k, seed)[0].contiguous()
    counts, lists = choose.count(indices, found.count)
    assert torch.equal(counts.cpu(), choose.count_ref(indices, found.count).cpu())
    # Some blocks left out, as if they were listed.
    slots = torch.arange(len(lists.slots), device=DEVICE, dtype=torch.int32) % 3 if data.draw(st.booleans()) else None
    result = on_cpu(tiles_of(indices, found, height, slots))
    expected = sort.sort_ref(indices, found.starts, height, slots)
    assert result.rows.shape == (k, sort.most_tiles(tokens, found.count, height))
    assert torch.equal(result.rows, expected.rows)
    filled, there = expected.rows > 0, expected.tokens >= 0
    assert torch.equal(result.adapter[filled], expected.adapter[filled])
    assert torch.equal(result.tokens[there], expected.tokens[there])
    # What the reference has to have done, in other words.
    left = torch.tensor([slots is None or not slots[t // lists.height] for t in range(tokens)])
    for j in range(k):
        own = [(indices[:, j].cpu() == n) & left for n, rank in enumerate(ranks) if rank]
        wanted = [t for chosen in own for t in chosen.nonzero().flatten()]
        assert expected.tokens[j][there[j]].tolist() == wanted


def test_tiles_at_their_bound():
    """Every adapter has one token more than full tiles, so that no surplus is left but what the bound allows."""
    height, adapters = 16, 5
    found = segments(torch.arange(adapters, device=DEVICE))
    indices = torch.arange(adapters, device=DEVICE).repeat(height + 1).unsqueeze(1)
    result = on_cpu(tiles_of(indices, found, height))
    assert sorted(result.rows[0].tolist(), reverse=True)[: 2 * adapters] == [height] * adapters + [1] * adapters
    assert result.rows.sum() == len(indices)


@pytest.mark.parametrize("parts, splits, absolute", [(1, 1, False), (2, 3, True)])
@pytest.mark.parametrize("least", [0.0, 0.7])
def test_choose(parts, splits, absolute, least):
    products = torch.randn(splits, 100, padded(parts * 9), device=DEVICE)
    options = {"absolute": absolute, "least_share": least}
    indices, weights, counts, lists = choose.choose(products, parts, 9, 7, 3, 0.5, **options)
    expected = choose.choose_ref(products, parts, 9, 3, 0.5, **options)
    assert 0 < (expected[1].sum(1) == 0).sum() < 100 or not least
    assert torch.equal(indices.long(), expected[0])
    close(weights, expected[1])
    assert torch.equal(counts, choose.count_ref(indices, 7))
    assert_lists(lists, counts)


@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(GROUPED, 1, 2, 5))
def test_tiles_are_the_reference(tokens, features, out, ranks, k, dtype):
    y, x, A, B, _, owner = problem(tokens, features, out, ranks, dtype)
    indices, weights = (tensor.contiguous() for tensor in routing_of(tokens, len(ranks), k))
    found = segments(owner)
    sorted_tiles = tiles_of(indices, found, 16)
    s = tiles.shrink_tiles(x, A, sorted_tiles, found)
    operands = (on_cpu(sorted_tiles), found.starts.cpu())
    expected = tiles.shrink_tiles_ref(x.cpu(), A.cpu(), *operands, s.shape[1])
    defined = expected != 0
    close(torch.where(defined, s.cpu(), 0), expected, dtype)
    wanted = tiles.expand_tiles_ref(y.cpu(), s.cpu(), B.cpu(), weights.cpu(), *operands)
    close(tiles.expand_tiles(y.clone(), s, B, weights, sorted_tiles, found), wanted, dtype)
    # Of the transposes, and into another tensor.
    transposed = tiles.shrink_tiles(x, A.t().contiguous().t(), sorted_tiles, found)
    close(torch.where(defined, transposed.cpu(), 0), expected, dtype)
    out = y.clone()
    tiles.expand_tiles(y, s, B.t().contiguous().t(), weights, sorted_tiles, found, out, early=False)
    close(out, wanted, dtype)
    # To a product in place of y: of the tokens that are in a tile of the first choice.
    left, right = (torch.randn(*shape, device=DEVICE).to(dtype) / 8 for shape in ((tokens, 70), (70, y.shape[1])))
    wanted = tiles.expand_tiles_ref(left.cpu(), s.cpu(), B.cpu(), weights.cpu(), *operands, gate=right.cpu())
    out = torch.zeros_like(y)
    tiles.expand_tiles(left, s, B, weights, sorted_tiles, found, out, gate=right, early=False)
    first = [own for choice, _, own, _ in tiles.filled(operands[0]) if choice == 0]
    for own in first:
        close(out.cpu()[own], wanted[own], dtype)
    assert tokens == 0 or first


@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(GROUPED, 2, 3))
@pytest.mark.parametrize("each", [0, 2])
def test_grouped_is_the_reference(tokens, features, out, ranks, k, dtype, each, monkeypatch):
    monkeypatch.setattr(grouped, "MOST_TOKENS", 64)  # several rounds
    monkeypatch.setattr(choose, "LISTED_EACH", each)  # most of these small ones meet few adapters if that is allowed
    y, x, A, B, gate, owner = problem(tokens, features, out, ranks, dtype)
    exact = [tensor.float().clone() for tensor in (y, x, A, B)]
    packed, found = pack(A, gate), segments(owner)
    for absolute, least in ((False, UNSURE), (True, 0.0)):
        result, options = y.clone(), {"absolute": absolute, "least_share": least}
        grouped.gated(result, x, packed, B, found, len(ranks), k, 1.5, **options)
        close(result, ops.gated_mix_ref(*exact, gate, owner, k, 1.5, **options), dtype)
    indices, weights = routing_of(tokens, len(ranks), k)
    grouped.given(y, x, A, B, found, indices, weights)
    close(y, ops.mix_ref(*exact, owner, indices, weights), dtype)


def test_grouped_with_long_runs_of_one_adapter():
    y, x, A, B, _, owner = problem(150, 24, 40, [3, 4, 5])
    indices = torch.tensor([2, 0, 2], device=DEVICE).repeat_interleave(50).unsqueeze(1)
    weights = torch.ones(150, 1, device=DEVICE)
    expected = ops.mix_ref(y, x, A, B, owner, indices, weights)
    grouped.given(y, x, A, B, segments(owner), indices, weights)
    close(y, expected)


@pytest.fixture
def grouped_at_any_size(monkeypatch):
    """The grouped way wherever it can be gone, and a list of the calls that went it."""
    calls = []
    monkeypatch.setattr(grouped, "LEAST_COLUMNS", 0)
    monkeypatch.setattr(grouped, "LEAST_TOKENS", 0)
    monkeypatch.setattr(grouped, "LEAST_TOKENS_EACH", 0)
    for name in ("gated", "given"):
        inner = getattr(grouped, name)
        monkeypatch.setattr(
            grouped, name, lambda *args, inner=inner, **options: (calls.append(inner), inner(*args, **options))
        )
    return calls


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_operators_go_the_grouped_way_where_it_fits(shuffle, grouped_at_any_size):
    tokens, N = sized(40, 9), sized(12, 8)
    y, x, A, B, gate, owner = problem(tokens, 48, 40, [4] * N, shuffle=shuffle)
    packed = pack(A, gate)
    expected = ops.gated_mix_ref(y, x, A, B, gate, owner, 2)
    strided = torch.zeros(tokens, 100, device=DEVICE)[:, 3:51].copy_(x)
    close(ops.gated_mix_(y.clone(), strided, packed, B, owner, N, 2), expected)
    close(ops.gated_mix_(y.clone(), x.t().contiguous().t(), packed, B, owner, N, 2), expected)
    indices, weights = routing_of(tokens, N, 2)
    close(ops.mix_(y.clone(), x, A, B, owner, indices, weights), ops.mix_ref(y, x, A, B, owner, indices, weights))
    assert len(grouped_at_any_size) == (0 if shuffle else 3), "columns out of order go the other way"
    close(ops.gated_mix_(y.clone(), x, packed, B, owner, N, N), ops.gated_mix_ref(y, x, A, B, gate, owner, N))
    assert len(grouped_at_any_size) == (0 if shuffle else 3), "so do tokens that choose many adapters"


def test_the_grouped_operators_are_operators(grouped_at_any_size):
    tokens = sized(20, 3)
    y, x, A, B, gate, owner = problem(tokens, 16, 16, [4] * 9)
    packed = pack(A, gate)
    indices, weights = routing_of(tokens, 9, 2)
    torch.library.opcheck(torch.ops.meteora.gated_mix_, (y, x, packed, B, owner, 9, 2, 1.0, False, 0.0, 0))
    torch.library.opcheck(torch.ops.meteora.mix_, (y, x, A, B, owner, indices, weights))
    assert grouped_at_any_size

    @torch.compile(fullgraph=True, backend="aot_eager")
    def inference(y, x):
        return ops.gated_mix_(y * 2, x, packed, B, owner, 9, 2) + 1

    grouped_at_any_size.clear()
    close(inference(y, x), ops.gated_mix_ref(y * 2, x, A, B, gate, owner, 2) + 1)
    assert grouped_at_any_size


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_grouped_what_is_not_finite_stays_in_its_token(value, grouped_at_any_size):
    y, x, A, B, gate, owner = problem(40, 24, 20, [4] * 9)
    packed = pack(A, gate)
    clean = ops.gated_mix_(y.clone(), x, packed, B, owner, 9, 2)
    x[2] = value
    result = ops.gated_mix_(y, x, packed, B, owner, 9, 2)
    others = torch.arange(40, device=DEVICE) != 2
    assert torch.equal(result[others], clean[others])
    assert torch.isnan(result[2]).all() and len(grouped_at_any_size) == 2


@pytest.mark.parametrize("large", [6e4, torch.inf])
@pytest.mark.parametrize("each", [0, 2])
def test_grouped_an_adapter_of_weight_zero_is_not_felt(each, large, monkeypatch):
    monkeypatch.setattr(choose, "LISTED_EACH", each)  # sorted, or listed
    y, x, A, B, _, owner = problem(6, 16, 20, [4, 4], torch.float16)
    A[owner == 1] = large  # overflows
    indices = torch.tensor([[0, 1]], device=DEVICE).expand(6, 2)
    weights = torch.tensor([[1.0, 0.0]], device=DEVICE).expand(6, 2)
    expected = ops.mix_ref(y.float(), x.float(), A.float(), B.float(), owner, indices[:, :1], weights[:, :1])
    grouped.given(y, x, A, B, segments(owner), indices, weights)
    close(y, expected, torch.float16)


def test_grouped_twice_is_the_same():
    tokens, N = sized((90, 6), (66, 4))
    y, x, A, B, gate, owner = problem(tokens, 1100, sized(40, 20), [16] * N)
    results = []
    for _ in range(2):
        result = y.clone()
        grouped.gated(result, x, pack(A, gate), B, segments(owner), N, 2)
        results.append(result)
    assert torch.equal(*results)


# Gates trained over many columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(GROUPED, 1, 2, 5))
def test_every_gradient_of_grouped(tokens, features, out, ranks, k, dtype):
    y, x, A, B, gate, owner = problem(tokens, features, out, ranks, dtype)
    B, upstream = B.t().contiguous().t(), torch.randn(out, tokens, device=DEVICE).t()  # strides that kernels do not read
    leaves, exact = ([t.clone().to(d).requires_grad_() for t in (y, x)] for d in (dtype, torch.float32))
    gates = [gate.clone().requires_grad_() for _ in range(2)]
    result = grouped_training.gated(*leaves, pack(A, gate), B, gates[0], segments(owner), k, 0.7, UNSURE)
    expected = ops.gated_mix_ref(*exact, A.float(), B.float(), gates[1], owner, k, 0.7, least_share=UNSURE)
    close(result, expected, dtype)
    result.backward(upstream.to(dtype))
    expected.backward(upstream)
    for name, leaf, reference in zip(("y", "x", "gate"), (*leaves, gates[0]), (*exact, gates[1]), strict=True):
        if name == "gate" and k == 1:
            assert torch.equal(leaf.grad, torch.zeros_like(leaf)), "one choice has the weight 1 whatever its logit"
        else:
            close(leaf.grad, reference.grad, dtype, slack=3)


@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(GROUPED, 1, 2, 5))
def test_every_gradient_of_grouped_with_a_given_routing(tokens, features, out, ranks, k, dtype):
    y, x, A, B, _, owner = problem(tokens, features, out, ranks, dtype)
    indices, weights = routing_of(tokens, len(ranks), k)
    leaves = [t.clone().requires_grad_() for t in (y, x, weights)]
    exact = [t.clone().float().requires_grad_() for t in (y, x, weights)]
    upstream = torch.randn(tokens, out, device=DEVICE)
    result = grouped_training.given(*leaves[:2], A, B, segments(owner), indices, leaves[2])
    expected = ops.mix_ref(*exact[:2], A.float(), B.float(), owner, indices, exact[2])
    close(result, expected, dtype)
    result.backward(upstream.to(dtype))
    expected.backward(upstream)
    for leaf, reference in zip(leaves, exact, strict=True):
        close(leaf.grad, reference.grad, dtype, slack=3)


@pytest.mark.parametrize("wanted", [("x",), ("gate",), ("y",), ("y", "gate")])
def test_grouped_makes_the_gradients_that_are_wanted(wanted):
    y, x, A, B, gate, owner = problem(sized(40, 9), 48, 40, [4] * sized(12, 8))
    leaves = [tensor.requires_grad_(name in wanted) for name, tensor in zip(("y", "x", "gate"), (y, x, gate))]
    grouped_training.gated(y, x, pack(A, gate.detach()), B, gate, segments(owner), 2).sum().backward()
    made = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    ops.gated_mix_ref(y, x, A, B, gate, owner, 2).sum().backward()
    for gradient, leaf in zip(made, leaves, strict=True):
        assert (gradient is None) == (leaf.grad is None)
        if gradient is not None:
            close(gradient, leaf.grad, slack=3)


@pytest.mark.parametrize("tokens, features, out, ranks, k", GROUPED)
def test_dots_of_tiles_are_the_reference(tokens, features, out, ranks, k):
    _, _, _, _, _, owner = problem(tokens, features, out, ranks)
    indices, found = routing_of(tokens, len(ranks), k)[0].contiguous(), segments(owner)
    sorted_tiles = tiles_of(indices, found, 16)
    a, b = torch.randn(2, sorted_tiles.tokens.numel(), padded(found.widest), device=DEVICE)
    expected = grouped_training.dot_tiles_ref(a.cpu(), b.cpu(), tokens, on_cpu(sorted_tiles), found.starts.cpu())
    close(grouped_training.dot_tiles(a, b, tokens, sorted_tiles, found), expected)


@pytest.mark.parametrize("adapters, width, k", [(1, 16, 1), (28, 32, 2), (256, 256, 5), (300, 304, 300)])
def test_the_way_back_through_the_choice(adapters, width, k):
    tokens = sized(37, 9)
    indices, weights = (tensor.contiguous() for tensor in routing_of(tokens, adapters, k))
    dweights = torch.randn(tokens, k, device=DEVICE)
    expected = grouped_training.choose_backward_ref(dweights, indices, weights, width, 0.7)
    result = grouped_training.choose_backward(dweights, indices, weights, width, 0.7, dtype=torch.float32)
    assert torch.equal(result[:, adapters:], torch.zeros_like(result[:, adapters:]))
    close(result, expected, slack=3)


def test_where_gates_are_trained_over_sorted_tokens(grouped_at_any_size, monkeypatch):
    """By the backend's functions, unless an adapter is trained too, or the columns are out of order, or it compiles."""
    tokens, N = sized(40, 9), sized(12, 8)
    y, x, A, B, gate, owner = problem(tokens, 48, 40, [4] * N)
    went = []
    for name in ("gated", "given"):
        inner = getattr(grouped_training, name)
        monkeypatch.setattr(grouped_training, name, lambda *args, inner=inner: went.append(inner) or inner(*args))
    gate.requires_grad_()
    indices, weights = routing_of(tokens, N, 2)
    gated = (y, x, A, B, gate)
    backend.gated_mix(*gated, owner, 2).sum().backward()
    backend.mix(y, x, A, B, owner, Routing(indices, weights.requires_grad_())).sum().backward()
    assert len(went) == 2 and not grouped_at_any_size
    backend.gated_mix(y, x, A.clone().requires_grad_(), B, gate, owner, 2).sum().backward()
    backend.gated_mix(y, x, A, B, gate, owner.flip(0), 2).sum().backward()
    torch.compile(backend.gated_mix, fullgraph=True, backend="aot_eager")(*gated, owner, 2).sum().backward()
    with torch.no_grad():
        backend.gated_mix(y, x, A, B, gate, owner, 2)
    assert len(went) == 2 and len(grouped_at_any_size) == 1


def test_training_over_sorted_tokens_twice_is_the_same():
    y, x, A, B, gate, owner = problem(*sized((90, 1100, 640), (66, 1024, 40)), [16] * sized(6, 3))
    results = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate)]
        out = grouped_training.gated(y, leaves[0], pack(A, gate), B, leaves[1], segments(owner), 2)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *results))


def test_training_over_sorted_tokens_with_activation_checkpointing(grouped_at_any_size):
    """Which lets a backward pass have what was saved for it once."""
    tokens, N = sized(40, 9), sized(12, 8)
    y, x, A, B, gate, owner = problem(tokens, 48, 40, [4] * N)
    indices, weights = routing_of(tokens, N, 2)
    for of, own in (
        (lambda x, gate: backend.gated_mix(y, x, A, B, gate, owner, 2), gate),
        (lambda x, weights: backend.mix(y, x, A, B, owner, Routing(indices, weights)), weights),
    ):
        gradients = []
        for through in (lambda f, *args: f(*args), functools.partial(checkpoint, use_reentrant=False)):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, own)]
            through(of, *leaves).square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        assert not grouped_at_any_size and all(map(torch.equal, *gradients))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_training_over_sorted_tokens_what_is_not_finite_stays_in_its_token(value):
    y, x, A, B, gate, owner = problem(40, 24, 20, [4] * 9)
    packed, found, others = pack(A, gate), segments(owner), torch.arange(40, device=DEVICE) != 2
    results = []
    for broken in (False, True):
        own = x.clone()
        if broken:
            own[2] = value
        own.requires_grad_()
        out = grouped_training.gated(y, own, packed, B, gate, found, 2)
        out.sum().backward()
        results.append((out.detach()[others], own.grad[others]))
        assert torch.isfinite(out).all() != broken
    assert all(map(torch.equal, *results))


@needs_gpu
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("features, out", [(4096, 4096), (1024, 8192), (8192, 512)])
def test_training_over_sorted_tokens_in_a_graph_at_a_real_size(features, out, k):
    """The backward pass alone is captured; it gives what it gives outside, time and again."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    y, x, A, B, gate, owner = problem(4000, features, out, [64] * 28, torch.bfloat16)
    dy = torch.randn_like(y)
    exact = [t.detach().float().requires_grad_(t is x or t is gate) for t in (y, x, A, B, gate)]
    ops.gated_mix_ref(*exact, owner, k).backward(dy.float())
    leaves = (x.requires_grad_(), gate.requires_grad_())
    assert grouped_training.fits(4000, A, B, owner, k) is not None
    result = backend.gated_mix(y, x, A, B, gate, owner, k)
    expected = torch.autograd.grad(result, leaves, dy, retain_graph=True)
    close(expected[0], exact[1].grad, torch.bfloat16, slack=3)
    if k > 1:
        close(expected[1], exact[4].grad, torch.bfloat16, slack=3)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        own = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        result = backend.gated_mix(y, own[0], A, B, own[1], owner, k)
        torch.autograd.grad(result, own, dy, retain_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = torch.autograd.grad(result, own, dy, retain_graph=True)
    for _ in range(20):
        graph.replay()
        assert all(map(torch.equal, captured, expected))


# Few adapters in a tile of consecutive tokens ------------------------------------------------------------------------

LISTED = [
    # tokens, features, out, ranks, k
    (1, 16, 16, [16, 16], 2),
    (70, 33, 65, [5, 1, 0, 40, 3, 8, 9, 2, 7], 3),  # nothing is a multiple of anything
    (sized(200, 130), sized(72, 64), 136, [8, 0, 16, 8, 24, 8, 8, 0], 2),  # aligned segments; the last is unknown to them
    (130, 1100, sized(40, 20), sized([64] * 7, [16] * 5), 2),  # the inner dimension in pieces
    (sized(150, 130), sized(1040, 1024), sized(150, 130), [64] * sized(6, 5), 2),  # and more than one program's columns
    (90, 24, 20, [150, 3, 70, 1, 2], 2),  # a rank of several chunks
]
ROUTINGS = ["runs", "uniform", "mixed"]


def routing_in(routing, tokens, adapters, k, seed=0):
    """``runs``: from 64 to 100 tokens agree; ``uniform``; ``mixed``: every other 64 of either kind."""
    indices, weights = routing_of(tokens, adapters, k, seed)
    run = torch.arange(2 + tokens // 64).repeat_interleave(64 + torch.arange(2 + tokens // 64) % 37)[:tokens]
    runs = indices[run.to(DEVICE).clamp_max(tokens - 1)]
    uniform = torch.full((tokens, 1), routing == "uniform", device=DEVICE)
    if routing == "mixed":
        uniform = (torch.arange(tokens, device=DEVICE) // 64 % 2 == 1).unsqueeze(1)
    return torch.where(uniform, indices, runs).contiguous(), weights.contiguous()


def gate_and_input(x, gate, indices):
    """A gate and x that choose ``indices`` in their order, each token for itself."""
    wanted = torch.randn(len(x), len(gate), device=DEVICE)
    places = torch.arange(indices.shape[1], 0, -1, device=DEVICE) + 4.0
    wanted.clamp_(-3, 3).scatter_(1, indices, places.expand(indices.shape))
    gate = torch.linalg.qr(gate.t()).Q.t().contiguous()
    return gate, (x.float() + (wanted - x.float() @ gate.t()) @ gate).to(x.dtype)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(LISTED, 1, 2, 3, 5))
def test_listed_is_the_reference(tokens, features, out, ranks, k, routing, dtype):
    y, x, A, B, _, owner = problem(tokens, features, out, ranks, dtype)
    indices, weights = routing_in(routing, tokens, len(ranks), k)
    found = segments(owner)
    counts, lists = choose.count(indices, found.count)
    assert_lists(lists, counts)
    s = listed.shrink_listed(x, A, indices, weights, lists, found)
    there = choose.Lists(lists.slots.cpu(), lists.adapters.cpu(), lists.height)
    most = lists.adapters.shape[1]
    expected = listed.shrink_listed_ref(
        x.cpu(), A.cpu(), indices.cpu(), weights.cpu(), there, found.starts.cpu(), s.shape[1] // most
    )
    slot = torch.arange(most).repeat_interleave(s.shape[1] // most)
    defined = slot < there.slots.repeat_interleave(lists.height).unsqueeze(1)
    assert defined[:64].any() == (routing != "uniform" or len(ranks) <= most)
    close(torch.where(defined, s.cpu(), 0), expected, dtype)
    assert torch.equal((s.cpu() == 0) & defined, (expected.to(dtype) == 0) & defined), "zero for those not chosen"
    wanted = listed.expand_listed_ref(y.cpu(), s.cpu(), B.cpu(), there, found.starts.cpu())
    close(listed.expand_listed(y, s, B, lists, found), wanted, dtype)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(LISTED, 1, 3))
def test_listed_and_sorted_together(tokens, features, out, ranks, k, routing, dtype, monkeypatch):
    monkeypatch.setattr(grouped, "MOST_TOKENS", 128)  # several rounds
    y, x, A, B, gate, owner = problem(tokens, features, out, ranks, dtype)
    indices, weights = routing_in(routing, tokens, len(ranks), k)
    gate, x = gate_and_input(x, gate, indices)
    exact = [tensor.float().clone() for tensor in (y, x, A, B)]
    assert torch.equal((exact[1] @ gate.t()).topk(k).indices, indices)
    result, found = y.clone(), segments(owner)
    grouped.gated(result, x, pack(A, gate), B, found, len(ranks), k, 1.5)
    close(result, ops.gated_mix_ref(*exact, gate, owner, k, 1.5), dtype)
    # Of either kind; interpreted, of one with each dtype.
    for given in sized((indices, indices.int()), (indices,) if dtype == torch.float32 else (indices.int(),)):
        result = y.clone()
        grouped.given(result, x, A, B, found, given, weights)
        close(result, ops.mix_ref(*exact, owner, indices, weights), dtype)


@given(
    st.integers(1, 150), st.integers(1, 40), st.integers(1, 70), st.lists(st.integers(0, 20), min_size=1, max_size=12),
    st.integers(1, 3), st.sampled_from(ROUTINGS), st.integers(1, 3), st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_listed_and_sorted_of_any_shape(tokens, features, out, ranks, k, routing, each, seed):
    ranks, k = [*ranks, 1], min(k, len(ranks) + 1)
    y, x, A, B, _, owner = problem(tokens, features, out, ranks, seed=seed)
    indices, weights = routing_in(routing, tokens, len(ranks), k, seed)
    expected = ops.mix_ref(y, x, A, B, owner, indices, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "LISTED_EACH", each)
        grouped.given(y, x, A, B, segments(owner), indices, weights)
    close(y, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_listed_what_is_not_finite_stays_in_its_token(value):
    y, x, A, B, gate, owner = problem(80, 24, 20, [4] * 4)
    found, others = segments(owner), torch.arange(80, device=DEVICE) != 2
    assert choose.count(routing_of(80, 4, 2)[0], 4)[1].slots.all()
    clean, spoiled = x.clone(), x.clone()
    spoiled[2] = value
    results = []
    for x in (clean, spoiled):
        results.append(y.clone())
        grouped.gated(results[-1], x, pack(A, gate), B, found, 4, 2)
    assert torch.equal(results[0][others], results[1][others])
    assert torch.isnan(results[1][2]).all()


@pytest.mark.parametrize("large", [6e4, torch.inf])
def test_listed_an_adapter_is_not_felt_by_those_that_did_not_choose_it(large):
    y, x, A, B, _, owner = problem(6, 16, 20, [4, 4, 4], torch.float16)
    A[owner == 1] = large  # overflows
    indices = torch.tensor([[0, 2]], device=DEVICE).repeat(6, 1)
    indices[4, 1] = 1
    weights = torch.tensor([[0.75, 0.25]], device=DEVICE).repeat(6, 1)
    expected = ops.mix_ref(y.float(), x.float(), A.float(), B.float(), owner, indices, weights)
    grouped.given(y, x, A, B, segments(owner), indices, weights)
    others = torch.arange(6, device=DEVICE) != 4
    close(y[others], expected[others], torch.float16)


def test_listed_an_adapter_that_is_chosen_twice():
    y, x, A, B, _, owner = problem(70, 16, 20, [4, 3])
    indices, weights = torch.ones(70, 2, dtype=torch.long, device=DEVICE), routing_of(70, 2, 2)[1].contiguous()
    expected = ops.mix_ref(y, x, A, B, owner, indices, weights)
    grouped.given(y, x, A, B, segments(owner), indices, weights)
    close(y, expected)


def test_nothing_is_listed_for_one_choice():
    counts, lists = choose.count(torch.zeros(64, 1, dtype=torch.int64, device=DEVICE), 4)
    assert lists.adapters.shape == (1, 0) and counts.sum() == 64
    assert choose.most_listed(4, 2) == 4 and not choose.most_listed(4, 1)


def test_listed_twice_is_the_same():
    tokens, N = sized((200, 9), (130, 5))
    y, x, A, B, _, owner = problem(tokens, 1100, sized(40, 20), [16] * N)
    results = []
    for _ in range(2):
        results.append(y.clone())
        grouped.given(results[-1], x, A, B, segments(owner), *routing_in("mixed", tokens, N, 2))
    assert torch.equal(*results)


def test_segments_are_found_once_and_again_after_a_change():
    owner = torch.tensor([0, 0, 2, 2, 2], device=DEVICE)
    found = segments(owner)
    assert found.starts.tolist() == [0, 2, 2, 5] and found.widest == 3 and found.count == 3 and not found.aligned
    assert segments(owner) is found
    owner[0] = 1
    assert segments(owner) is None
    assert segments(torch.arange(4, device=DEVICE).repeat_interleave(8)).aligned


def test_where_the_grouped_way_fits():
    many, few = (torch.arange(28, device=DEVICE).repeat_interleave(rank) for rank in (64, 8))
    assert grouped.fits(4096, many, 2) is segments(many)
    assert grouped.fits(16, many, 2) is None and grouped.fits(4096, few, 2) is None
    assert grouped.fits(4096, many, 4) is None and grouped.fits(4096, many.flip(0), 2) is None
    thin = torch.arange(200, device=DEVICE).repeat_interleave(8)
    assert grouped.fits(4096, thin, 1) is None and grouped.fits(2**14, thin, 1) is not None
    assert grouped.fits(4096, torch.arange(2, device=DEVICE).repeat_interleave(800), 1) is None


@needs_gpu
@pytest.mark.parametrize("tokens", [2500, 5000])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouped_in_a_graph_at_a_real_size(tokens, routing):
    """What was captured with one routing is replayed with another, so neither way may be decided by the host."""
    y, x, A, B, gate, owner = problem(tokens, 2048, 1024, [64] * 28, torch.bfloat16)
    gate, replayed = gate_and_input(x, gate, routing_in(routing, tokens, 28, 2)[0])
    packed = pack(A, gate)
    assert grouped.fits(tokens, owner, 2) is not None
    ops.gated_mix_(y.clone(), x, packed, B, owner, 28, 2)
    out, graph = y.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gated_mix_(out, x, packed, B, owner, 28, 2)
    x.copy_(replayed)
    out.copy_(y)
    graph.replay()
    assert torch.equal(out, ops.gated_mix_(y.clone(), x, packed, B, owner, 28, 2))
    exact = [tensor.float() for tensor in (y, x, A, B)]
    close(out, ops.gated_mix_ref(*exact, gate, owner, 2), torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("features, out", [(4096, 4096), (1024, 8192), (8192, 512)])
@pytest.mark.parametrize("k", [1, 2])
def test_grouped_is_the_same_whether_or_not_launches_overlap(features, out, k, routing, monkeypatch):
    torch.utils.deterministic.fill_uninitialized_memory = False  # its kernels would keep the others apart
    y, x, A, B, gate, owner = problem(4000, features, out, [64] * 28, torch.bfloat16)
    gate, x = gate_and_input(x, gate, routing_in(routing, 4000, 28, k)[0])
    packed = pack(A, gate)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "overlaps", lambda tensor: False)
        expected = ops.gated_mix_(y.clone(), x, packed, B, owner, 28, k)
    close(expected, ops.gated_mix_ref(*(t.float() for t in (y, x, A, B)), gate, owner, k), torch.bfloat16)
    ops.gated_mix_(y.clone(), x, packed, B, owner, 28, k)
    out, graph = y.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gated_mix_(out, x, packed, B, owner, 28, k)
    for _ in range(20):
        out.copy_(y)
        graph.replay()
        assert torch.equal(out, expected)


# Few tokens, many columns: what they chose alone ---------------------------------------------------------------------

GATHERED = [
    # tokens, features, out, ranks, k
    (1, 40, 36, [64] * 3, 1),
    (1, 1100, 20, [64, 64], 2),  # the inner dimension in pieces
    (3, 33, 35, [1, 0, 64, 3, 8], 2),  # nothing is a multiple of anything
    (3, 257, 17, [8, 32, 0, 16, 0], 2),  # aligned segments; the last adapter is unknown to them
    (2, 40, 24, [1, 3, 8, 16], 4),  # all are chosen
    (17, 24, 40, [3, 5, 7], 1),
    (1, 24, 6, [sized(150, 130), 3], 2),
    (2, 40, 12, [1] * 12, 12),
]


@pytest.mark.parametrize("tokens, features, out, ranks, k, dtype", in_dtypes(GATHERED, 2, 3, 4))
def test_gathered_is_the_reference(tokens, features, out, ranks, k, dtype):
    y, x, A, B, gate, owner = problem(tokens, features, out, ranks, dtype)
    exact = [tensor.float().clone() for tensor in (y, x, A, B)]
    packed, found = pack(A, gate), segments(owner)
    for absolute, least in ((False, UNSURE), (True, 0.0)):
        result, options = y.clone(), {"absolute": absolute, "least_share": least}
        gathered.gated(result, x, packed, B, found, len(ranks), k, 1.5, **options)
        close(result, ops.gated_mix_ref(*exact, gate, owner, k, 1.5, **options), dtype)
    indices, weights = routing_of(tokens, len(ranks), k)
    expected = ops.mix_ref(*exact, owner, indices, weights)
    gathered.given(y, x, A, B, found, indices.int() if tokens % 2 else indices, weights)
    close(y, expected, dtype)
    for name in ("loop", "dense"):
        close(y, MIXERS[name](*(tensor.clone() for tensor in exact), owner, Routing(indices, weights)), dtype)


@pytest.mark.parametrize("tokens, features, out, ranks, k", GATHERED)
def test_each_kernel_of_gathered_is_its_reference(tokens, features, out, ranks, k):
    layers, dtype = 2, torch.float16  # one layer, and float32, are above
    ys, x, As, Bs, gates, owner = siblings_of(tokens, features, (out, 19), ranks, dtype)
    packed, found, N = torch.cat([pack(*each) for each in zip(As, gates, strict=True)]), segments(owner), len(ranks)
    logits = gathered.gate(x, packed, layers, len(owner), N)
    close(logits.sum(0), gathered.gate_ref(x, packed, layers, len(owner), N)[0], torch.float32, 3)
    indices, weights = choose.choose_ref(logits, 1, N, k, 0.5, least_share=UNSURE)
    choice = gathered.Choice(k, logits, 0.5, least_share=UNSURE)
    partial = gathered.shrink_chosen(x, packed, layers, choice, found)
    there = torch.arange(found.widest) < torch.tensor(ranks)[indices.cpu()].unsqueeze(-1).unsqueeze(-1)
    assert partial[there.expand(partial.shape).to(DEVICE)].isfinite().all(), "all that is needed is written"
    partial = torch.where(there.to(DEVICE), partial, 0)
    close(partial.sum(2), gathered.shrink_chosen_ref(x.cpu(), packed.cpu(), layers, indices, found).sum(2), dtype)
    expected = gathered.expand_chosen_ref(ys, partial, Bs, indices, weights, found)
    gathered.expand_chosen(ys, partial, Bs, choice, found)
    for y, wanted in zip(ys, expected, strict=True):
        close(y, wanted, dtype)


@given(
    st.integers(1, 5), st.integers(1, 600), st.integers(1, 40),
    st.lists(st.sampled_from([0, 1, 3, 8, 20, 64]), min_size=1, max_size=6).filter(any), st.data(),
    st.floats(0.2, 20), st.booleans(), LEAST, st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_gathered_of_any_shape(tokens, features, out, ranks, data, temperature, absolute, least, seed):
    k = data.draw(st.integers(1, len(ranks)))
    y, x, A, B, gate, owner = problem(tokens, features, out, ranks, seed=seed)
    options = {"absolute": absolute, "least_share": least}
    expected = ops.gated_mix_ref(y, x, A, B, gate, owner, k, temperature, **options)
    gathered.gated(y, x, pack(A, gate), B, segments(owner), len(ranks), k, temperature, **options)
    close(y, expected)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_gathered_where_all_logits_are_alike(k):
    """Untrained gates choose the adapters that come first, with one weight for all."""
    y, x, A, B, gate, owner = problem(2, 48, 40, [3, 64, 8, 1, 8, 8])
    indices, weights = torch.arange(k, device=DEVICE).expand(2, k), torch.full((2, k), 1 / k, device=DEVICE)
    expected = ops.mix_ref(y, x, A, B, owner, indices, weights)
    gathered.gated(y, x, pack(A, torch.zeros_like(gate)), B, segments(owner), 6, k)
    close(y, expected)


@pytest.mark.parametrize("way", [None, "gathered_at_any_size", "grouped_at_any_size"])
@pytest.mark.parametrize(
    "tokens, ranks, k",
    sized(
        [(2, [8] * 9, 2), (10, [1] * 40, 3), (9, [64] * 12, 1), (9, [64] * 12, 2)],
        [(2, [8] * 9, 2), (9, [1] * 12, 3), (3, [16] * 8, 1), (3, [16] * 8, 2)],
    ),
)
def test_unsure_tokens_get_nothing_by_any_way(tokens, ranks, k, way, request):
    """What they are depends on no temperature; others get what they ever do, to the bit; NaN is no doubt."""
    calls = [None] if way is None else request.getfixturevalue(way)
    y, x, A, B, gate, owner = problem(tokens, 48, 40, ranks)
    x[0] *= 1e-3  # all logits are nearly alike, and yet what an adapter added would be seen
    gate[0] = 100 * x[1]
    operands = (x, pack(A, gate), B, owner, len(ranks), k)
    for temperature in sized((0.1, 1.0, 50.0), (0.1, 50.0)):
        usual, found = (ops.gated_mix_(y.clone(), *operands, temperature, least_share=least) for least in (0.0, 0.6))
        shares = torch.softmax(x.double() @ gate.double().t(), -1).topk(k).values.sum(1)
        assert ((shares - 0.6).abs() > 1e-4).all() and shares[0] < 0.6 < shares[1]
        assert torch.equal(found, torch.where((shares < 0.6).unsqueeze(1), y, usual))
    x[0] = torch.nan
    assert torch.isnan(ops.gated_mix_(y.clone(), *operands, 1.0, least_share=0.6)[0]).all() and calls


@pytest.fixture
def gathered_at_any_size(monkeypatch):
    """The gathered way wherever it can be gone, and a list of the calls that went it."""
    calls = []
    for name, value in (("LEAST_COLUMNS", 0), ("LEAST_COLUMNS_OF_MANY", 0), ("MOST_CHOSEN", 1e9), ("MOST_READ", 1e9)):
        monkeypatch.setattr(gathered, name, value)
    inner = gathered.add
    monkeypatch.setattr(gathered, "add", lambda *args, **options: (calls.append(inner), inner(*args, **options)))
    return calls


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_operators_go_the_gathered_way_where_it_fits(shuffle, gathered_at_any_size):
    y, x, A, B, gate, owner = problem(5, 48, 40, [4] * 12, shuffle=shuffle)
    packed = pack(A, gate)
    expected = ops.gated_mix_ref(y, x, A, B, gate, owner, 2)
    strided = torch.zeros(5, 100, device=DEVICE)[:, 3:51].copy_(x)
    close(ops.gated_mix_(y.clone(), strided, packed, B, owner, 12, 2), expected)
    close(ops.gated_mix_(y.clone(), x.t().contiguous().t(), packed, B, owner, 12, 2), expected)
    close(ops.gated_mix_(y.clone(), x, packed, B.t().contiguous().t(), owner, 12, 2), expected)
    indices, weights = routing_of(5, 12, 2)
    close(ops.mix_(y.clone(), x, A, B, owner, indices, weights), ops.mix_ref(y, x, A, B, owner, indices, weights))
    wide = torch.zeros(5, 90, device=DEVICE)[:, 7:47].copy_(y)
    close(ops.gated_mix_(wide, x, packed, B, owner, 12, 2), expected)
    assert len(gathered_at_any_size) == (0 if shuffle else 5), "columns out of order go the other way"
    leaves = [tensor.clone().requires_grad_() for tensor in (y, x, A, B, gate)]
    close(backend.gated_mix(*leaves, owner, 2), expected)
    assert len(gathered_at_any_size) == (0 if shuffle else 5), "so does what needs gradients"


@pytest.mark.parametrize(
    "early, dtype, tokens, features, outs, ranks, k",
    [
        (True, DTYPES[0], 1, 48, (40, 17, 33), [8] * 4, 2),
        (False, DTYPES[1], 2, 1100, (16, 70), [64, 3, 8], 1),
        (True, DTYPES[1], 3, 40, (70, 16, 1), [1, 0, 7, 0], 3),
    ],
)
def test_gathered_siblings(tokens, features, outs, ranks, k, early, dtype, gathered_at_any_size):
    check_siblings(siblings_of(tokens, features, outs, ranks, dtype), k, 1.5, dtype, early=early)
    assert len(gathered_at_any_size) == len(outs) + 1


def test_the_gathered_operators_are_operators(gathered_at_any_size):
    y, x, A, B, gate, owner = problem(4, 16, 16, [4] * 9)
    packed = pack(A, gate)
    indices, weights = routing_of(4, 9, 2)
    torch.library.opcheck(torch.ops.meteora.gated_mix_, (y, x, packed, B, owner, 9, 2, 1.0, False, 0.0, 0))
    torch.library.opcheck(torch.ops.meteora.mix_, (y, x, A, B, owner, indices, weights))
    assert gathered_at_any_size

    @torch.compile(fullgraph=True, backend="aot_eager")
    def inference(y, x):
        return ops.gated_mix_(y * 2, x, packed, B, owner, 9, 2) + 1

    gathered_at_any_size.clear()
    close(inference(y, x), ops.gated_mix_ref(y * 2, x, A, B, gate, owner, 2) + 1)
    assert gathered_at_any_size


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_gathered_what_is_not_finite_stays_in_its_token(value, k):
    y, x, A, B, gate, owner = problem(6, 24, 20, [4] * 9)
    packed, found, results = pack(A, gate), segments(owner), []
    spoiled = x.clone()
    spoiled[2] = value
    for tokens in (x, spoiled):
        results.append(y.clone())
        gathered.gated(results[-1], tokens, packed, B, found, 9, k)
    others = torch.arange(6, device=DEVICE) != 2
    assert torch.equal(results[0][others], results[1][others])
    assert torch.isnan(results[1][2]).all()


def test_gathered_an_adapter_is_not_felt_unless_chosen_with_a_weight():
    y, x, A, B, _, owner = problem(6, 16, 20, [4, 4, 4], torch.float16)
    A[owner == 1] = 6e4  # overflows
    A[owner == 2], B[:, owner == 2] = torch.nan, torch.nan
    indices = torch.tensor([[0, 1]], device=DEVICE).expand(6, 2)
    weights = torch.tensor([[1.0, 0.0]], device=DEVICE).expand(6, 2)
    exact = [tensor.float() for tensor in (y, x, A[:4], B[:, :4])]
    expected = ops.mix_ref(*exact, owner[:4], indices[:, :1], weights[:, :1])
    gathered.given(y, x, A, B, segments(owner), indices, weights)
    close(y, expected, torch.float16)


def test_gathered_adapters_without_columns_add_nothing():
    y, x, A, B, gate, owner = problem(4, 16, 20, [0, 3, 0, 4, 0])
    before, wanted = y.clone(), torch.tensor([[0, 4]], device=DEVICE).expand(4, 2)
    gathered.given(y, x, A, B, segments(owner), wanted, torch.full((4, 2), 0.5, device=DEVICE))
    assert torch.equal(y, before)
    gate, x = gate_and_input(x, gate, wanted)
    gathered.gated(y, x, pack(A, gate), B, segments(owner), 5, 2)
    assert torch.equal(y, before)


def test_gathered_an_adapter_that_is_chosen_twice():
    y, x, A, B, _, owner = problem(3, 16, 20, [4, 3])
    indices, weights = torch.ones(3, 2, dtype=torch.long, device=DEVICE), routing_of(3, 2, 2)[1].contiguous()
    expected = ops.mix_ref(y, x, A, B, owner, indices, weights)
    gathered.given(y, x, A, B, segments(owner), indices, weights)
    close(y, expected)


def test_gathered_twice_is_the_same():
    y, x, A, B, gate, owner = problem(sized(3, 1), 1100, 40, [16] * 6)
    results = [y.clone() for _ in range(2)]
    for result in results:
        gathered.gated(result, x, pack(A, gate), B, segments(owner), 6, 2)
    assert torch.equal(*results)


def test_gathered_no_tokens(gathered_at_any_size):
    y, x, A, B, gate, owner = problem(0, 8, 6, [2, 2])
    assert ops.gated_mix_(y, x, pack(A, gate), B, owner, 2, 1).shape == (0, 6)
    assert ops.mix_(y, x, A, B, owner, *routing_of(0, 2, 1)).shape == (0, 6) and not gathered_at_any_size


def test_where_the_gathered_way_fits():
    def columns(adapters, rank):
        return torch.arange(adapters, device=DEVICE).repeat_interleave(rank)

    many, few = columns(28, 64), columns(28, 8)
    for tokens, owner, k in ((1, many, 2), (16, many, 2), (32, many, 1), (1, many, 14), (4, many, 7), (1, few, 2)):
        assert gathered.fits(tokens, owner, k) is segments(owner)
    assert gathered.fits(17, many, 2) is None and gathered.fits(33, many, 1) is None, "too many choices"
    assert gathered.fits(1, few, 3) is None and gathered.fits(1, columns(12, 8), 2) is None, "too few columns"
    assert gathered.fits(1, many, 15) is None and gathered.fits(8, many, 7) is None, "most are chosen"
    assert gathered.fits(16, columns(4, 32), 1) is None
    assert gathered.fits(1, many.flip(0), 2) is None
    assert gathered.fits(1, columns(4, 300), 1) is None, "ranks beyond MOST_RANK"


@needs_gpu
@pytest.mark.parametrize(
    "tokens, features, out", [(1, 4096, 14336), (2, 14336, 4096), (7, 4096, 1024), (16, 4096, 4096)]
)
@pytest.mark.parametrize("k", [1, 2])
def test_gathered_is_the_same_whether_or_not_launches_overlap(tokens, features, out, k, monkeypatch):
    """And what was captured with one routing is replayed with another."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # its kernels would keep the others apart
    y, x, A, B, gate, owner = problem(tokens, features, out, [64] * 28, torch.bfloat16)
    gate, other = gate_and_input(x, gate, routing_of(tokens, 28, k)[0])
    gate, x = gate_and_input(x, gate, routing_of(tokens, 28, k, seed=1)[0])
    packed, expected = pack(A, gate), []
    assert gathered.fits(tokens, owner, k) is not None
    with monkeypatch.context() as patch:
        patch.setattr(gathered, "overlaps", lambda tensor: False)
        patch.setattr(launch, "overlaps", lambda tensor: False)
        for found in (x, other):
            expected.append(ops.gated_mix_(y.clone(), found, packed, B, owner, 28, k))
            exact = [tensor.float() for tensor in (y, found, A, B)]
            close(expected[-1], ops.gated_mix_ref(*exact, gate, owner, k), torch.bfloat16)
    ops.gated_mix_(y.clone(), x, packed, B, owner, 28, k)
    out, graph, inputs = y.clone(), torch.cuda.CUDAGraph(), (x.clone(), other)
    with torch.cuda.graph(graph):
        ops.gated_mix_(out, x, packed, B, owner, 28, k)
    for _ in range(20):
        for found, wanted in zip(inputs, expected, strict=True):
            x.copy_(found)
            out.copy_(y)
            graph.replay()
            assert torch.equal(out, wanted)


@needs_gpu
def test_gathered_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB on the GPU")
    y, x, A, B, _, owner = problem(2, 512, 40, [64] * 18, torch.bfloat16)
    apart = torch.empty(len(A), 2**21, device=DEVICE, dtype=torch.bfloat16)[:, :512]  # 2.4e9 numbers
    apart.copy_(A)
    indices, weights = torch.tensor([[17, 3], [0, 17]], device=DEVICE), torch.full((2, 2), 0.5, device=DEVICE)
    expected = y.clone()
    gathered.given(expected, x, A, B, segments(owner), indices, weights)
    gathered.given(y, x, apart, B, segments(owner), indices, weights)
    assert torch.equal(y, expected)
