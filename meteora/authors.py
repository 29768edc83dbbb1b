"""The checkpoint that the paper's authors published (github.com/NJUDeepEngine/meteora), as adapters and gates of ours.

It is the state dict of their whole model. Each adapted linear layer has there, beside ``base_layer.weight``::

    <module>.moe_gate.weight (N, in)     <module>.lora_A.weight (N * r, in)     <module>.lora_B.weight (out, N * r)

with adapter n in rows (columns) n * r .. n * r + r - 1, all of one rank, the scaling not folded in, and every name
behind PEFT's ``base_model.model.``. Which adapter is n-th is not stored. Their script trained the LoRA weights along
with the gates, so these belong to the gates and are taken from the file; the adapters' own are what tells the order.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from meteora.adapters import PEFT_PREFIX, Adapter, AdapterError, LoraWeights, peft_tensors

PARTS = ("moe_gate", "lora_A", "lora_B")
# Training moves an adapter's update B A, but not so far that its cosine with where it began is that of a stranger's.
LEAST_SIMILARITY = 0.1
CLEARLY_NEARER = 0.1  # radians: in one module alone, adapters that are much alike may come to lie nearer to each other


def read_authors_checkpoint(file: str | Path, adapters: Sequence[Adapter]) -> tuple[list[Adapter], dict[str, Tensor]]:
    """The adapters with the weights of ``file``, and module -> gate (N, in) float32.

    Args:
        file: a safetensors file (or a folder of its shards), or a ``torch.save`` archive of tensors alone. What else
            it holds, such as the base model's weights, is not read.
        adapters: those that the authors' model was made of, in the checkpoint's order. One that training did not
            change is returned as it is.

    Raises:
        AdapterError: if the file is missing, unreadable or incomplete, or its adapters are others than ``adapters``,
            or the same ones in another order, be it in one module.
    """
    layers = _read(Path(file).expanduser())
    _check_layers(layers, adapters, file)
    blocks = [_block(layers, n, adapter) for n, adapter in enumerate(adapters)]
    _check_order(blocks, adapters, file)
    changed = [_with_weights(adapter, modules) for adapter, modules in zip(adapters, blocks, strict=True)]
    return changed, {module: parts["moe_gate"].float() for module, parts in layers.items()}


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    """Module -> part -> tensor."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise AdapterError(f"{path} is no file, nor a folder with one; give the authors' state dict (safetensors).")
    layers: dict[str, dict[str, Tensor]] = {}
    for file in files:
        for key, tensor in _wanted_tensors(file):
            module, part = key.removesuffix(".weight").rsplit(".", 1)
            layers.setdefault(module.removeprefix(PEFT_PREFIX), {})[part] = tensor
    if not layers:
        raise AdapterError(f"{path} holds no moe_gate, lora_A or lora_B; it is not a checkpoint of the authors' code.")
    return layers


def _wanted_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if zipfile.is_zipfile(file):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise AdapterError(f"{file} holds more than tensors, or is corrupt, and is not unpickled.") from error
        yield from ((key, state[key]) for key in _wanted(state))
        return
    try:
        with safe_open(file, framework="pt") as tensors:
            yield from ((key, tensors.get_tensor(key)) for key in _wanted(tensors.keys()))
    except SafetensorError as error:
        raise AdapterError(f"{file} is no safetensors file, or a corrupt one ({error}); download it again.") from error


def _wanted(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.endswith(tuple(f".{part}.weight" for part in PARTS))]


def _check_layers(layers: dict[str, dict[str, Tensor]], adapters: Sequence[Adapter], file: str | Path) -> None:
    for module, parts in layers.items():
        if missing := sorted(set(PARTS) - set(parts)):
            raise AdapterError(f"{file}: module {module!r} has no {missing[0]}.")
        gate, A, B = (parts[part] for part in PARTS)
        matrices = all(tensor.dim() == 2 for tensor in (gate, A, B))
        if matrices and len(gate) != len(adapters):
            raise AdapterError(f"{file} mixes {len(gate)} adapters, {len(adapters)} were given.")
        if not matrices or A.shape[1] != gate.shape[1] or len(A) != B.shape[1] or len(A) % len(adapters):
            raise AdapterError(
                f"{file}: module {module!r} has moe_gate {tuple(gate.shape)}, lora_A {tuple(A.shape)} and lora_B "
                f"{tuple(B.shape)}; expected (N, in), (N * r, in) and (out, N * r)."
            )
        for part, tensor in parts.items():
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{file}: {part} of module {module!r} holds NaN or infinite weights.")
    for adapter in adapters:
        if set(adapter.modules) != set(layers):
            odd = sorted(set(adapter.modules) ^ set(layers))[0]
            raise AdapterError(f"{file} does not match adapter {adapter.name!r}: only one of them has {odd!r}.")


def _block(layers: dict[str, dict[str, Tensor]], n: int, adapter: Adapter) -> dict[str, LoraWeights]:
    """The n-th adapter in the checkpoint: module -> weights, with the scaling of ``adapter``."""
    modules = {}
    for module, parts in layers.items():
        rank = len(parts["lora_A"]) // len(parts["moe_gate"])
        own = adapter.modules[module]
        A, B = parts["lora_A"][n * rank : (n + 1) * rank], parts["lora_B"][:, n * rank : (n + 1) * rank]
        if (A.shape, B.shape) != (own.A.shape, own.B.shape):
            raise AdapterError(
                f"adapter {adapter.name!r} has lora_A {tuple(own.A.shape)} and lora_B {tuple(own.B.shape)} in "
                f"{module!r}, the checkpoint {tuple(A.shape)} and {tuple(B.shape)}."
            )
        modules[module] = LoraWeights(A, B, own.scaling)
    return modules


def _check_order(blocks: Sequence[dict[str, LoraWeights]], adapters: Sequence[Adapter], file: str | Path) -> None:
    names = [adapter.name for adapter in adapters]
    cosines = {
        module: _cosines([block[module] for block in blocks], [adapter.modules[module] for adapter in adapters])
        for module in blocks[0]
    }
    similar = torch.stack(list(cosines.values())).mean(0)
    nearest = similar.argmax(dim=1).tolist()
    found = [n if similar[n, n] >= similar[n].max() - 1e-6 else best for n, best in enumerate(nearest)]
    for n, best in enumerate(found):
        if similar[n, best] < LEAST_SIMILARITY:
            raise AdapterError(
                f"{file}: the adapter in place {n}, where {names[n]!r} was given, resembles none of those given (its "
                f"cosine with {names[best]!r} is {similar[n, best]:.2f}); give the adapters it was made of."
            )
    for n, best in enumerate(found):
        if best != n:
            raise AdapterError(
                f"{file}: the adapter in place {n} is {names[best]!r}, but {names[n]!r} was given there; the "
                f"checkpoint's order is {', '.join(repr(names[n]) for n in found)}."
            )
    for module, similar in cosines.items():
        angles = similar.clamp(-1, 1).arccos()
        nearest = angles.argmin(dim=1).tolist()
        moved = {n: best for n, best in enumerate(nearest) if angles[n, n] > angles[n, best] + CLEARLY_NEARER}
        # Others may lean to a neighbour: an update that was next to nothing has the direction of what training did.
        if moved and sorted(moved) == sorted(moved.values()):
            n, best = next(iter(moved.items()))
            raise AdapterError(
                f"{file}: in module {module!r} the adapter in place {n} is {names[best]!r}, which elsewhere is "
                f"{names[n]!r}; every module must have one order, so convert or download the file again."
            )


def _cosines(blocks: Sequence[LoraWeights], adapters: Sequence[LoraWeights]) -> Tensor:
    """Cosines (N, N) between the updates B A of the blocks and of the adapters in one module.

    <B A, B' A'> = sum((B^T B') * (A A'^T)), so that no (out, in) matrix is formed.
    """
    count, rank = len(blocks), blocks[0].rank
    A, other_A = (torch.stack([pair.A.float() for pair in pairs]) for pairs in (blocks, adapters))  # (N, r, in)
    Bt, other_Bt = (torch.stack([pair.B.float().t() for pair in pairs]) for pairs in (blocks, adapters))  # (N, r, out)
    products = (Bt.flatten(0, 1) @ other_Bt.flatten(0, 1).t()) * (A.flatten(0, 1) @ other_A.flatten(0, 1).t())
    inner = products.view(count, rank, count, rank).sum((1, 3))
    norms, other_norms = (
        ((B @ B.mT) * (A @ A.mT)).sum((1, 2)).clamp(min=1e-30).sqrt() for A, B in ((A, Bt), (other_A, other_Bt))
    )
    return inner / norms.unsqueeze(1) / other_norms


def _with_weights(adapter: Adapter, modules: dict[str, LoraWeights]) -> Adapter:
    same = all(
        torch.equal(own.A.to(pair.A.dtype), pair.A) and torch.equal(own.B.to(pair.B.dtype), pair.B)
        for own, pair in ((adapter.modules[module], pair) for module, pair in modules.items())
    )
    if same:
        return adapter
    written = save(peft_tensors(modules), metadata={"format": "pt"})
    return replace(adapter, sha256=hashlib.sha256(written).hexdigest(), modules=modules, in_memory=True)
