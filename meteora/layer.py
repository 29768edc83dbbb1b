"""One linear layer with its mixture of LoRAs: y = W x + sum_j w_j s_j B_j (A_j x)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meteora.adapters import LoraWeights
from meteora.backends import get_gated_mix, get_mix
from meteora.backends.own import mix_own
from meteora.gating import Routing, forced, gate_logits, route
from meteora.kernels.packing import pack
from meteora.siblings import Siblings, state_of
from meteora.trace import Trace

logger = logging.getLogger(__name__)


class ForcedAdapters:
    """One adapter index per sample, and how often ``generate`` repeats each sample.

    ``device`` is where most layers ask for it.
    """

    def __init__(self, indices: Sequence[int], *, one_for_all: bool, device: torch.device | None = None) -> None:
        self.indices = torch.tensor(indices, dtype=torch.int64, device=device)
        self.one_for_all = one_for_all
        self.repeats = 1
        self._key: tuple | None = None
        self._routing: Routing | None = None

    def routing(self, batch: torch.Size, device: torch.device) -> Routing:
        """The routing of all tokens of an input of shape (*batch, in). Kept, as every layer of a pass asks the same."""
        if torch.compiler.is_compiling():  # a kept key would tie the graph to its sizes; the compiler shares the work
            return forced(self._per_token(batch).to(device))
        key = (batch, device, self.repeats, torch.is_inference_mode_enabled())
        if key != self._key:
            self._routing, self._key = forced(self._per_token(batch).to(device)), key
        return self._routing

    def _per_token(self, batch: torch.Size) -> Tensor:
        if self.one_for_all:
            return self.indices.expand(batch.numel())
        samples = len(self.indices) * self.repeats
        if len(batch) != 2:
            raise ValueError(
                f"route_to got {len(self.indices)} names, one per sample, but a layer gets the tokens of all samples in one "
                f"row, {tuple(batch)}; give one name for all samples, or adapters that leave this layer out."
            )
        if batch[0] != samples:
            raise ValueError(
                f"route_to got {len(self.indices)} names, one per sample, but the input has shape {tuple(batch)} "
                f"(samples, tokens); expected {samples} samples."
            )
        return self.indices.repeat_interleave(self.repeats * batch[1])


@dataclass
class MixtureState:
    """What all layers of a model share: the settings, and what is being forced, recorded or trained at the moment."""

    top_k: int
    temperature: float = 1.0
    backend: str = "auto"
    absolute_logits: bool = False  # the gates' rows are Arrow's prototypes, whose sign means nothing
    least_share: float = 0.0  # of all adapters' softmax, below which the chosen weigh nothing
    enabled: bool = True
    forced: ForcedAdapters | None = None
    own: Tensor | None = None  # (samples, tokens, N) one-hot: adapters of one rank are trained, each on its own tokens
    trace: Trace | None = None
    gate_observer: Callable[[MeteoraLinear, Tensor, Tensor], None] | None = None
    router: Callable[[Tensor, int, float, float], Routing] = route  # makes a routing of logits; another is an experiment
    adapters: list[str] = field(default_factory=list)  # the names of all
    untrained: set[str] = field(default_factory=set)  # of them, whose rows of the gates no training has seen
    warned: bool = False
    inside: list[list] = field(default_factory=list)  # of each context that was entered: its thread, what it set, what was

    def __getstate__(self) -> dict:  # a copy is inside of no context
        outside = {name: before for _, name, before in reversed(self.inside)}
        return self.__dict__ | outside | {"inside": []}

    @property
    def warning(self) -> str | None:
        """Said once, when untrained gates choose."""
        names = ", ".join(repr(name) for name in self.adapters if name in self.untrained)
        if not names:
            return None
        if len(self.untrained) == len(self.adapters):
            return f"the gates were never trained, so the choice among {names} is arbitrary; call train_gates."
        return f"the gates were never trained for {names}; call train_gates on data that includes it."

    @property
    def watched(self) -> bool:
        """Whether anybody but the kernels wants the gates' logits, or chooses in their place."""
        others = self.forced is not None or self.router is not route
        return others or self.trace is not None or self.gate_observer is not None


class MeteoraLinear(nn.Module):
    """A frozen linear layer, its adapters, and the gate that chooses among them for every token.

    Args:
        base_layer: the linear layer, left untouched.
        num_adapters: N; the gate has N rows.
        adapters: index (0..N-1) -> that adapter's weights here. One that is absent can be chosen, and adds zero.
        state: the settings shared by all layers.
        dtype: of the adapters' weights.
        device: of everything that is added, if that is not where the linear layer's weight lies (it may be offloaded).
        name: the layer's dotted name in its model, for the trace.

    Attributes:
        base_layer, gate: ``nn.Linear(in, N, bias=False)``, zero until trained; float32, to whatever the rest is cast.
        lora_A (R, in), lora_B (out, R): all adapters' weights, R the sum of their ranks; scaling is folded into B.
        column_adapter (R,): the adapter that owns each of the R.
        ranks: the same as (adapter, rank) pairs in their order, for whoever must not wait for a GPU.
        siblings: this layer and those that get the same input, once a model has looked for them.
        widest: the out of the widest of them.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        num_adapters: int,
        adapters: dict[int, LoraWeights],
        state: MixtureState,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer
        self.name = name
        self.state = state
        device = device or base_layer.weight.device
        # Zero is neutral: no adapter is preferred, and the result does not depend on a random state.
        self.gate = nn.Linear(self.in_features, num_adapters, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.gate.weight)
        A = [w.A.to(device, dtype) for w in adapters.values()]
        B = [(w.B.to(device, torch.float32) * w.scaling).to(dtype) for w in adapters.values()]
        self.ranks = [(n, w.rank) for n, w in adapters.items()]
        owner = [torch.full((rank,), n) for n, rank in self.ranks]
        self.lora_A = nn.Parameter(torch.cat(A), requires_grad=False)
        self.lora_B = nn.Parameter(torch.cat(B, dim=1), requires_grad=False)
        self.register_buffer("column_adapter", torch.cat(owner).to(device), persistent=False)
        self.siblings: Siblings | None = None
        self.widest = self.out_features
        self.forget_packed()

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @torch.no_grad()
    def add_adapter(self, weights: LoraWeights | None) -> None:
        """Give the gate one more row (zero), and the layer that adapter's weights, if it has any here."""
        device, dtype = self.lora_A.device, self.lora_A.dtype
        old = self.gate.weight
        grown = torch.cat([old, old.new_zeros(1, self.in_features)])
        self.gate = nn.Linear(self.in_features, len(grown), bias=False, device=old.device, dtype=old.dtype)
        self.gate.weight = nn.Parameter(grown, requires_grad=old.requires_grad)
        self.forget_packed()
        if weights is None:
            return
        B = (weights.B.to(device, torch.float32) * weights.scaling).to(dtype)
        self.lora_A = nn.Parameter(torch.cat([self.lora_A, weights.A.to(device, dtype)]), requires_grad=False)
        self.lora_B = nn.Parameter(torch.cat([self.lora_B, B], dim=1), requires_grad=False)
        self.ranks.append((len(grown) - 1, weights.rank))
        owner = self.column_adapter.new_full((weights.rank,), len(grown) - 1)
        self.column_adapter = torch.cat([self.column_adapter, owner])

    def sizes(self) -> tuple[int, int, int]:
        """What grows when an adapter is added, for :meth:`cut_back`: adapters of the gate, with weights here, columns."""
        return self.gate.out_features, len(self.ranks), len(self.lora_A)

    def cut_back(self, sizes: tuple[int, int, int]) -> None:
        """Be what the layer was at these :meth:`sizes`, without memory for it: there may be none left."""
        N, count, R = sizes
        self.gate.weight = nn.Parameter(self.gate.weight.detach()[:N], requires_grad=self.gate.weight.requires_grad)
        self.gate.out_features = N
        self.lora_A = nn.Parameter(self.lora_A.detach()[:R], requires_grad=False)
        self.lora_B = nn.Parameter(self.lora_B.detach()[:, :R], requires_grad=False)
        self.ranks, self.column_adapter = self.ranks[:count], self.column_adapter[:R]
        self.forget_packed()

    def _apply(self, fn: Callable, recurse: bool = True) -> MeteoraLinear:  # moves and converts
        self.forget_packed()
        before = self.gate.weight.detach()
        super()._apply(fn, recurse)
        # A gate of 16 bits flips close decisions, and in float16 AdamW's epsilon is 0: one step, and all is NaN.
        weight = self.gate.weight
        if weight.dtype != torch.float32:
            weight.data = before.to(weight.device, torch.float32)
            if weight.grad is not None:
                weight.grad = weight.grad.float()
        if self.siblings is not None:
            self.siblings.forget_moved()
        return self

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": None, "_packed_from": None, "_held": None}  # a copy packs its own

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_packed()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out)."""
        # A compiler cannot tell whether x was written to between two layers.
        if not torch.compiler.is_compiling() and self.siblings is not None:
            y = self.siblings.output(self, x)
            if y is not None:
                return y
        y = self.base_layer(x)
        state, device = self.state, y.device.type
        if not state.enabled:
            return y
        lora_A = self.lora_A
        A, B = lora_A.to(y.dtype), self.lora_B.to(y.dtype)
        if state.own is not None:
            if state.own.shape[:-1] != x.shape[:-1]:
                raise ValueError(
                    f"{self.name!r} gets tokens of shape {tuple(x.shape[:-1])}, where {tuple(state.own.shape[:-1])} (samples, "
                    "tokens) go into the model, so adapters cannot be trained together in it; leave it out of target_modules."
                )
            with torch.autocast(device, enabled=False):
                return mix_own(y, x.to(y.dtype), A, B, state.own.to(y.dtype))
        # The mixture is added in place, which autograd forbids in a view of bitsandbytes' making or a backward hook's, and
        # forward hooks were given y.
        base = self.base_layer
        foreign_view = torch.is_grad_enabled() and type(base) is not nn.Linear and y._is_view()
        if foreign_view or base._forward_hooks or base._backward_hooks or base._backward_pre_hooks:
            y = y.clone()
        tokens, flat = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        gated_mix = get_gated_mix(state.backend, device) if self._gate_can_be_fused(x, y) else None
        # Autocast has done its part in choosing y's type; inside, it would mix types where y is not of its own.
        with torch.autocast(device, enabled=False):
            if gated_mix is not None:
                self.warn_once()
                gate, owner = self.gate.weight, self.column_adapter
                packed = self.packed_weights(lora_A, gate, A.dtype)
                options = {
                    "absolute": state.absolute_logits, "least_share": state.least_share, "packed": packed,
                    "widest": self.widest,
                }  # fmt: skip
                mixed = gated_mix(flat, tokens, A, B, gate, owner, state.top_k, state.temperature, **options)
            else:
                routing = self._routing(x, tokens)
                mixed = get_mix(state.backend, device)(flat, tokens.to(y.dtype), A, B, self.column_adapter, routing)
        return mixed.view(y.shape)

    def _routing(self, x: Tensor, tokens: Tensor) -> Routing:
        """The adapters of x (..., in), whose ``tokens`` are (T, in): forced, or chosen by the gate."""
        state = self.state
        routing = state.forced.routing(x.shape[:-1], x.device) if state.forced else None
        if routing is None or state.trace is not None or state.gate_observer is not None:
            logits = gate_logits(tokens, self.gate.weight, absolute=state.absolute_logits)  # (T, N)
            if state.gate_observer is not None:
                state.gate_observer(self, tokens, logits)
            if routing is None:
                if state.gate_observer is None:
                    self.warn_once()
                routing = state.router(logits, state.top_k, state.temperature, state.least_share)
            # Not once more where a backward pass recomputes the layer, of which a compiler knows nothing.
            recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
            if state.trace is not None and not recomputed:
                state.trace.record(self.name, x.shape[:-1], logits, routing)
        return routing

    def _gate_can_be_fused(self, x: Tensor, y: Tensor) -> bool:
        """Whether nobody but the kernels wants the gate's logits, and a fused backend takes x as it is."""
        state = self.state
        trained = state.absolute_logits and torch.is_grad_enabled()
        return not state.watched and not trained and x.dtype == y.dtype

    def packed_weights(self, lora_A: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What a fused backend multiplies x with, kept as long as the weights stay; ``None``: to be made in each call.

        The kept tensor holds A's values, so ``lora_A`` becomes a view of it and nothing is stored twice. Whether the
        weights stay is seen by their version, which torch leaves as it is when something is written through ``.data``,
        and by fused optimisers; a compiled graph does not look. So whatever is kept is forgotten in a pass that may
        train them; whoever writes to them otherwise calls :meth:`forget_packed`.

        Args:
            lora_A, gate: this layer's. Each access to a module's parameter is a call, so they are not asked for again.
        """
        if torch.is_grad_enabled() and (lora_A.requires_grad or gate.requires_grad):
            self.forget_packed()
            return None
        if torch.compiler.is_compiling():
            return self._packed if self._packed is not None and self._packed.dtype == dtype else None
        if self._packed is None or self._packed_from != (dtype, *state_of(lora_A, gate)):
            if torch._guards.detect_fake_mode() is not None:
                return None  # what has no numbers is not kept
            if lora_A.is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # it would be made in each replay, in memory that is the graph's
            # An ordinary tensor even if this call is inference alone: what lora_A becomes may be trained through later.
            with torch.inference_mode(False), torch.no_grad():
                # Those of siblings together, and at once: later they would have to move, and graphs that read them, fail.
                if self.siblings is None or dtype != lora_A.dtype or not self.siblings.pack_all(self):
                    self.hold_packed(pack(lora_A.to(dtype), gate))
        return self._packed

    def forget_packed(self) -> None:
        """The weights are others, or may be: what was packed of them counts no more."""
        self._packed = self._packed_from = self._held = None

    def hold_packed(self, packed: Tensor) -> None:
        """Keep what was packed of the weights as they are, (C, in)."""
        self._packed = packed
        # A parameter that was made under inference mode stays as it is: it can be no view of an ordinary tensor.
        if packed.dtype == self.lora_A.dtype and not self.lora_A.is_inference():
            self.lora_A.data = packed[: len(self.lora_A)]
        weights = (self.lora_A, self.gate.weight)
        self._packed_from = (packed.dtype, *state_of(*weights))
        self._held = [weight.detach() for weight in weights]  # so that no other tensor can come to lie where they do

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """All that an output is computed with: lora_A, lora_B, the gate's weight, the base layer's weight and bias."""
        modules, own = self._modules, self._parameters
        base, gate = modules["base_layer"], modules["gate"]
        try:  # where modules keep them, as to ask a module takes a decoding step three times as long
            there = base._parameters
            return own["lora_A"], own["lora_B"], gate._parameters["weight"], there["weight"], there["bias"]
        except KeyError:  # sharded, say, and kept as attributes
            return self.lora_A, self.lora_B, gate.weight, base.weight, base.bias

    def warn_once(self) -> None:
        if self.state.untrained and not self.state.warned and not torch.compiler.is_compiling():
            logger.warning(self.state.warning)
            self.state.warned = True

    def extra_repr(self) -> str:
        return (
            f"in={self.in_features}, out={self.out_features}, adapters={self.gate.out_features}, R={len(self.lora_A)}"
        )
