"""One linear layer's mixture of LoRAs in every way there is, forward and backward, and what float64 says to it.

Every strategy adds its update into a given y (T, out), as it does inside a layer, and the backends do so with gate and
routing included. Two bounds stand beside them: ``single_lora`` adds one adapter for all tokens without a gate, ``base``
is the frozen layer alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from meteora.backends import get_gated_mix, get_mix
from meteora.gating import gate_logits, route
from meteora.kernels.packing import pack
from meteora.study.benchmark_results import BOUNDS

RUN_LENGTHS = (64, 192)  # tokens of a run, from .. to: about a prompt of the tasks, and at the edge of no tile
# Between any two logits of a token: far more than the rounding of x, so that all backends choose the same adapters.
GAP = 0.02
CHECKED_TOKENS = 256
# Largest relative error (norm of the difference over norm of the expected) that rounding explains.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

Call = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Cell:
    """One setting in which all strategies are measured. ``routing``: ``uniform``, or ``runs`` of tokens that agree."""

    tokens: int
    adapters: int
    rank: int
    top_k: int
    in_features: int
    out_features: int
    dtype: str
    routing: str


@dataclass(frozen=True)
class Layer:
    """W (out, in); all adapters' A (R, in) and B (out, R); the first one's own (r, in) and (out, r); gate (N, in)."""

    W: Tensor
    A: Tensor
    B: Tensor
    single_A: Tensor
    single_B: Tensor
    gate: Tensor  # float32 and orthonormal, whatever the others' type
    column_adapter: Tensor  # (R,) int64
    packed: Tensor  # A and gate in one matrix, which a model keeps for backends that compute the gate as well

    def double(self) -> Layer:
        """The same in float64."""
        kept = ("column_adapter", "packed")
        weights = {f.name: getattr(self, f.name).double() for f in fields(self) if f.name not in kept}
        return replace(self, **weights)


@dataclass(frozen=True)
class Operands:
    """A layer, its input x (T, in), the y (T, out) that is added into, and the gradient dy (T, out) of the result."""

    layer: Layer
    x: Tensor
    y: Tensor
    dy: Tensor


def make_layer(cell: Cell, generator: torch.Generator) -> Layer:
    """Random weights on the generator's device, whose update is about as large as the layer's own output.

    Raises:
        ValueError: if there are more adapters than features, so that no gate can be orthonormal.
    """
    if cell.adapters > cell.in_features:
        raise ValueError(f"{cell.adapters} adapters need a layer of at least as many features, not {cell.in_features}.")
    dtype, R, r = getattr(torch, cell.dtype), cell.adapters * cell.rank, cell.rank

    def normal(rows: int, columns: int, variance: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=generator.device)
        return values.mul_(math.sqrt(variance)).to(dtype)

    A, B = normal(R, cell.in_features, 1 / cell.in_features), normal(cell.out_features, R, 1 / r)
    square = torch.randn(cell.in_features, cell.adapters, generator=generator, device=generator.device)
    gate = torch.linalg.qr(square).Q.t().contiguous()
    return Layer(
        W=normal(cell.out_features, cell.in_features, 1 / cell.in_features),
        A=A,
        B=B,
        single_A=A[:r].clone(),
        single_B=B[:, :r].contiguous(),
        gate=gate,
        packed=pack(A, gate),
        column_adapter=torch.arange(cell.adapters, device=generator.device).repeat_interleave(r),
    )


def make_logits(cell: Cell, generator: torch.Generator, *, one_run: bool = False) -> Tensor:
    """Gate logits (T, N) float32 of the cell's routing, any two of a token at least ``GAP`` apart.

    ``uniform``: independent for each token. ``runs``: the same for RUN_LENGTHS tokens in a row, or for all.
    """
    device, low, high = generator.device, *RUN_LENGTHS
    logits = torch.randn(cell.tokens, cell.adapters, generator=generator, device=device)
    logits += GAP * logits.argsort(dim=1).argsort(dim=1)  # each logit's place among its token's
    if cell.routing == "uniform":
        return logits
    if one_run:
        return logits[:1].expand(cell.tokens, -1)
    lengths = torch.randint(low, high + 1, (1 + cell.tokens // low,), generator=generator, device=device)
    run = torch.arange(len(lengths), device=device).repeat_interleave(lengths)[: cell.tokens]
    return logits[run]


def make_input(layer: Layer, logits: Tensor, generator: torch.Generator) -> Tensor:
    """Random x (T, in) for which the gate's logits are ``logits`` (T, N), up to x's rounding."""
    x = torch.randn(len(logits), layer.gate.shape[1], generator=generator, device=generator.device)
    x += (logits - x @ layer.gate.t()) @ layer.gate
    return x.to(layer.W.dtype)


def make_operands(cell: Cell, device: torch.device, seed: int = 0) -> Operands:
    """Random operands, the same each time on one kind of device, and whatever the cell's ``top_k``."""
    generator = torch.Generator(device).manual_seed(seed)
    layer = make_layer(cell, generator)
    x = make_input(layer, make_logits(cell, generator), generator)
    shape = (cell.tokens, cell.out_features)
    dy = torch.randn(shape, generator=generator, device=device, dtype=x.dtype)
    return Operands(layer, x, torch.zeros_like(dy), dy)


def update(name: str, top_k: int, device: torch.device) -> Callable[[Layer, Tensor, Tensor], Tensor]:
    """A strategy: (layer, x (T, in), y (T, out)) -> y + its update; of ``base`` the frozen layer's output alone."""
    if name == "base":
        return lambda layer, x, y: x @ layer.W.t()
    if name == "single_lora":
        return lambda layer, x, y: y.addmm_(x @ layer.single_A.t(), layer.single_B.t())
    fused = get_gated_mix(name, device.type)
    if fused is not None:
        return lambda layer, x, y: fused(
            y, x, layer.A, layer.B, layer.gate, layer.column_adapter, top_k, packed=layer.packed
        )
    mix = get_mix(name, device.type)
    return lambda layer, x, y: mix(
        y, x, layer.A, layer.B, layer.column_adapter, route(gate_logits(x, layer.gate), top_k)
    )


def forward_pass(name: str, top_k: int, o: Operands) -> Call:
    """A call that does a strategy's forward pass and returns its result (T, out)."""
    return partial(update(name, top_k, o.x.device), o.layer, o.x, o.y)


def backward_pass(name: str, top_k: int, o: Operands, dy: Tensor | None = None) -> Call:
    """Do a strategy's forward pass now, and return a call that does its backward pass alone, as often as it is called.

    The gradients (of dy, by default ``o.dy``) are those of x for ``base``; of x, A (r, in) and B (out, r) for
    ``single_lora``, which is being trained; of x and the gate (N, in) for the backends, whose adapters are frozen.
    """
    dy = o.dy if dy is None else dy
    if name == "base":
        return lambda: (dy @ o.layer.W,)
    # Leaves of their own: they belong to the stream that is current now, as a CUDA graph needs it.
    x = o.x.detach().requires_grad_()
    names = ("single_A", "single_B") if name == "single_lora" else ("gate",)
    trained = {field: getattr(o.layer, field).detach().requires_grad_() for field in names}
    out = update(name, top_k, x.device)(replace(o.layer, **trained), x, o.y.detach())
    return lambda: torch.autograd.grad(out, (x, *trained.values()), dy, retain_graph=True)


# What is expected ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """Float64 results of one strategy for some tokens: ``rows`` (at most CHECKED_TOKENS,), ``values``.

    ``values`` is what is added to y, or in mode ``backward`` the gradients that `backward_pass` names when dy is zero
    at all other tokens; the first of them, of x, is that of the rows.
    """

    rows: Tensor
    values: tuple[Tensor, ...]


def expect(cell: Cell, o: Operands, name: str, mode: str) -> Expected:
    """The equation of the paper in float64, one adapter after the other, and its derivatives.

    Only the choice of adapters is that of the float32 logits.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(cell.tokens, generator=generator)[:CHECKED_TOKENS].sort().values.to(o.x.device)
    indices = route(gate_logits(o.x[rows], o.layer.gate), cell.top_k).indices
    exact, x, dy = o.layer.double(), o.x[rows].double(), o.dy[rows].double()
    if mode == "forward":
        with torch.no_grad():
            return Expected(rows, (_equation(name, exact, x, indices),))
    names = {"base": (), "single_lora": ("single_A", "single_B")}.get(name, ("gate",))
    trained = {field: getattr(exact, field).detach().requires_grad_() for field in names}
    x.requires_grad_()
    out = _equation(name, replace(exact, **trained), x, indices)
    return Expected(rows, torch.autograd.grad(out, (x, *trained.values()), dy))


def _equation(name: str, layer: Layer, x: Tensor, indices: Tensor) -> Tensor:
    """What is added to y (T, out) by a bound, or else by every backend."""
    if name == "base":
        return x @ layer.W.t()
    if name == "single_lora":
        return x @ layer.single_A.t() @ layer.single_B.t()
    weights = torch.softmax((x @ layer.gate.t()).gather(1, indices), dim=1)  # (T, k)
    total = x.new_zeros(len(x), len(layer.B))
    for n in indices.unique().tolist():
        columns = layer.column_adapter == n
        weight = (weights * (indices == n)).sum(dim=1, keepdim=True)  # (T, 1)
        total = total + (weight * (x @ layer.A[columns].t())) @ layer.B[:, columns].t()
    return total


def check(cell: Cell, o: Operands, name: str, mode: str, expected: Expected) -> None:
    """Raise ``AssertionError`` unless the strategy computes what is ``expected``, up to rounding, and all of it."""
    poison = [torch.full_like(tensor, math.nan) for tensor in (o.x, o.y, o.layer.gate)]
    del poison  # freed memory is what the next results are written to, and a hole in them then shows
    found = _forward_error(cell, o, name, expected) if mode == "forward" else _backward_error(cell, o, name, expected)
    if found is not None:
        raise AssertionError(f"{name} is wrong in its {mode} pass: {found}, in {cell}.")


def _forward_error(cell: Cell, o: Operands, name: str, expected: Expected) -> str | None:
    start = o.dy  # as good as any other numbers of the right size
    o.y.copy_(start)
    found = forward_pass(name, cell.top_k, o)()
    before = 0 if name == "base" else start[expected.rows].double()
    message = _difference("the result", found[expected.rows].double() - before, expected.values[0], o.x.dtype)
    # Adding rarely leaves a number as it was, by rounding; a tile that was left out would be a larger share.
    untouched = (found == start).sum(dim=1)
    if message is None and (untouched > 3 + 0.02 * cell.out_features).any():
        message = f"nothing was added in parts of token {int(untouched.argmax())}"
    if message is None and not found.isfinite().all():
        message = "the result is not finite everywhere"
    return message


def _backward_error(cell: Cell, o: Operands, name: str, expected: Expected) -> str | None:
    o.y.zero_()
    dy = torch.zeros_like(o.dy)
    dy[expected.rows] = o.dy[expected.rows]
    dx, *others = backward_pass(name, cell.top_k, o, dy)()
    message = _difference("the gradient of x", dx[expected.rows], expected.values[0], o.x.dtype)
    elsewhere = torch.ones(cell.tokens, dtype=torch.bool, device=dx.device)
    elsewhere[expected.rows] = False
    if message is None and (dx[elsewhere] != 0).any():
        message = "the gradient of x is not zero for tokens whose result has none"
    for n, (gradient, value) in enumerate(zip(others, expected.values[1:], strict=True), 1):
        # A gate's gradient is a difference between adapters' contributions, so the rounding of these weighs more in it.
        message = message or _difference(f"gradient {n} of the trained weights", gradient, value, o.x.dtype, slack=5)
    return message


def _difference(what: str, found: Tensor, expected: Tensor, dtype: torch.dtype, slack: float = 1.0) -> str | None:
    """Half a sentence, if it is larger than rounding explains. Where nothing but zero is expected, it is absolute."""
    norm = expected.norm().item()
    error = (found.double() - expected).norm().item() / (norm or 1.0)
    return None if error <= slack * TOLERANCE[dtype] else f"{what} is off by {error:.1e} (relative)"


def strategies(backends: Sequence[str]) -> tuple[str, ...]:
    """The names of all that is measured: the bounds, then the backends."""
    return (*BOUNDS, *backends)


def gathered_bytes(cell: Cell, mode: str) -> int:
    """What ``bmm`` holds at least: weights copied for every token, one matrix at a time or both for a backward pass."""
    width = max(cell.in_features, cell.out_features) if mode == "forward" else cell.in_features + cell.out_features
    return cell.tokens * cell.top_k * cell.rank * width * getattr(torch, cell.dtype).itemsize
