"""A frozen language model with a mixture of LoRAs in its linear layers."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from meteora.adapters import Adapter, AdapterError, list_adapters, load_adapter
from meteora.arrow import set_prototypes
from meteora.authors import read_authors_checkpoint
from meteora.backends import get_mix
from meteora.checkpoint import (
    ADAPTERS_FOLDER,
    CHECKPOINT_PARTS,
    check_free_for_checkpoint,
    find_checkpoint,
    read_adapters,
    read_gates,
    read_settings,
    upload,
    write_checkpoint,
)
from meteora.config import MeteoraConfig, check_least_share, check_temperature, check_top_k
from meteora.contexts import to_be_entered
from meteora.files import atomic_directory
from meteora.hub import HUB_ERRORS, absence, is_absence
from meteora.layer import ForcedAdapters, MeteoraLinear, MixtureState
from meteora.siblings import link_siblings
from meteora.trace import Trace

logger = logging.getLogger(__name__)

_ENTERING = threading.RLock()  # a collector may end a forgotten context while another is entered

_REFUSE_PEFT = (
    "a mixture gets its adapters by add_adapter(name, path), uses one by `with model.route_to(name):` and none by `with "
    "model.disable_adapters():`; adapters of PEFT in its base model would change what all of these compute."
)
_REFUSE_MERGE = (
    "a mixture of LoRAs cannot be merged into the base weights: which adapters a layer adds depends on its input, so "
    "there is no one weight that equals them all."
)


# Options of generate with which the model reads other tokens than those of the text; the last, if it is not 1.
_UNTRACEABLE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "guidance_scale")


class MeteoraModel(nn.Module):
    """A base model whose linear layers carry N adapters and a gate each; everything but the gates is frozen.

    Make one with :meth:`from_adapters` or :meth:`from_pretrained`. Whatever is not defined here (``config``,
    ``device``, ``generation_config``, ...) is the base model's.

    Attributes:
        base_model: the model, its adapted modules replaced in place by :class:`MeteoraLinear`.
        adapter_names: in the order of the gates' rows.
    """

    def __init__(self, base_model: nn.Module, adapters: Sequence[Adapter], config: MeteoraConfig) -> None:
        super().__init__()
        if not isinstance(config, MeteoraConfig):
            raise ValueError(f"config must be a MeteoraConfig, not a {type(config).__name__}.")
        check_untouched(base_model)
        self.base_model = base_model
        self._adapters = list(adapters)
        self.state = MixtureState(
            top_k=min(2, len(adapters)) if config.top_k is None else check_top_k(config.top_k, len(adapters)),
            temperature=config.temperature,
            backend=config.backend,
            absolute_logits=config.absolute_logits,
            least_share=config.least_share,
            adapters=self.adapter_names,
            untrained=set(self.adapter_names),
        )
        get_mix(config.backend)
        for adapter in self._adapters:
            _check_fit(base_model, adapter)
        _warn_of_other_bases(base_model, self._adapters)
        self._was_training = base_model.training
        self._was_trainable = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
        base_model.requires_grad_(False)
        self.layers: dict[str, MeteoraLinear] = {}
        self._recomputed: dict[nn.Module, Any] = {}  # decoder layer -> its own forward before, if it had one
        self._recomputing: dict | None = None  # how activations are recomputed, if they are
        with self._or_unload():
            for module in _in_model_order(base_model, {m for a in adapters for m in a.modules}):
                self._wrap(module, {n: a.modules[module] for n, a in enumerate(adapters) if module in a.modules})
            link_siblings(self.layers)
        self._adapters = [_without_weights(adapter) for adapter in adapters]
        self.train(self._was_training)

    @classmethod
    def from_adapters(
        cls,
        base_model: nn.Module | str | Path,
        adapters: Mapping[str, str | Path] | str | Path,
        config: MeteoraConfig | None = None,
        *,
        gates: str | None = None,
    ) -> MeteoraModel:
        """Put PEFT LoRA adapters into a base model.

        Args:
            base_model: a decoder from transformers (changed in place), or the path or hub id of one.
            adapters: name -> directory or hub id, or one folder that holds PEFT directories. Ranks, alphas and target
                modules may differ.
            gates: ``None`` for gates to be trained, which start at zero; ``"arrow"`` for gates without training, made
                of the adapters themselves (:mod:`meteora.arrow`). ``train_gates`` starts such gates anew.

        Raises:
            AdapterError: for an adapter that is missing, unsupported, or does not fit the base model, or a base model
                that is neither a directory nor to be had from the hub.
            ValueError: for top_k > N, or other gates.
        """
        if gates not in (None, "arrow"):
            raise ValueError(f"unknown gates {gates!r}; choose 'arrow', or None for gates to be trained.")
        config = config or MeteoraConfig()
        loaded = [load_adapter(name, source) for name, source in list_adapters(adapters).items()]
        model = cls(_load_base(base_model), loaded, config)
        if gates == "arrow":
            model.state.absolute_logits = True
            with model._or_unload():
                set_prototypes(model.layers.values())
            model.state.untrained.clear()
        return model

    @classmethod
    def from_pretrained(
        cls, base_model: nn.Module | str | Path, checkpoint: str | Path, *, revision: str | None = None
    ) -> MeteoraModel:
        """Load what :meth:`save_pretrained` wrote, on top of the same base model.

        Args:
            checkpoint: the directory, or the hub id of one that :meth:`push_to_hub` uploaded.
            revision: branch, tag or commit of the checkpoint at the hub; of a directory there is but one.

        Raises:
            AdapterError: if the checkpoint is missing or incomplete, its adapters are not those it was saved with, or
                the base model cannot be had.
        """
        directory = find_checkpoint(checkpoint, revision)
        saved = read_settings(directory)
        adapters = read_adapters(directory, saved)
        gates = read_gates(directory)
        base_model, config = _load_base(base_model), MeteoraConfig(**saved["config"])
        try:
            get_mix(config.backend)
        except RuntimeError as error:  # what a model computes does not depend on it
            logger.warning("%s names a backend of another machine, so it is 'auto' here: %s", directory, error)
            config = replace(config, backend="auto")
        model = cls(base_model, adapters, config)
        with model._or_unload():
            model._set_gates(gates, directory)
        model.state.untrained = set(saved["untrained"])
        return model

    @classmethod
    def from_authors_checkpoint(
        cls,
        base_model: nn.Module | str | Path,
        adapters: Mapping[str, str | Path] | str | Path,
        file: str | Path,
        config: MeteoraConfig | None = None,
    ) -> MeteoraModel:
        """Load the gates and LoRA weights that the paper's authors published; see :mod:`meteora.authors`.

        Args:
            adapters: the adapters their model was made of, as for :meth:`from_adapters`, in the checkpoint's order.
            file: their state dict, safetensors or ``torch.save``; it is never unpickled beyond tensors.

        Raises:
            AdapterError: if the file cannot be read, or is of other adapters, or of these in another order, or the base
                model cannot be had.
        """
        loaded = [load_adapter(name, source) for name, source in list_adapters(adapters).items()]
        changed, gates = read_authors_checkpoint(file, loaded)
        model = cls(_load_base(base_model), changed, config or MeteoraConfig())
        with model._or_unload():
            model._set_gates(gates, file)
        model.state.untrained.clear()
        return model

    def save_pretrained(self, directory: str | Path, *, copy_adapters: bool = True) -> None:
        """Write gates (safetensors), settings, the adapters in their order, and a model card (README.md).

        With ``copy_adapters=False`` the adapters are only referred to, by where they lie and their sha256. The
        directory appears complete or not at all; an earlier checkpoint there is replaced, and what else lies there, such as
        a tokenizer, stays.

        Raises:
            FileExistsError: if something else in the directory has the name of a checkpoint's file.
            AdapterError: if an adapter's file is gone, or changed since it was loaded.
        """
        self.require_layers()
        check_free_for_checkpoint(directory)
        target = Path(directory).expanduser().resolve() / ADAPTERS_FOLDER
        inside = [adapter.name for adapter in self._adapters if adapter.directory.resolve().is_relative_to(target)]
        if inside and not copy_adapters:
            raise AdapterError(
                f"adapter {inside[0]!r} lies in {target}, which would be replaced; leave out copy_adapters=False."
            )
        unsaved = [adapter.name for adapter in self._adapters if adapter.in_memory]
        if unsaved and not copy_adapters:
            raise AdapterError(f"adapter {unsaved[0]!r} lies in no directory yet; leave out copy_adapters=False.")
        with atomic_directory(directory, CHECKPOINT_PARTS) as parts:
            write_checkpoint(self, parts, copy_adapters=copy_adapters)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a MeteoRA checkpoint",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the hub's repository ``repo_id``; return the commit's address.

        Raises:
            AdapterError: if the hub does not take it.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "checkpoint")
            return upload(
                Path(folder) / "checkpoint", repo_id, private=private, token=token, commit_message=commit_message
            )

    @contextmanager
    def _or_unload(self) -> Iterator[None]:
        """If the block fails, the base model is given back as it was."""
        try:
            yield
        except BaseException:
            self.unload()
            raise

    @torch.no_grad()
    def _set_gates(self, gates: Mapping[str, torch.Tensor], source: str | Path) -> None:
        if set(gates) != set(self.layers):
            odd = sorted(set(gates) ^ set(self.layers))[0]
            raise AdapterError(f"{source} does not match the adapters: a gate for {odd!r} is on one side only.")
        for name, layer in self.layers.items():
            if gates[name].shape != layer.gate.weight.shape:
                raise AdapterError(
                    f"{source}: the gate of {name!r} has shape {tuple(gates[name].shape)}; "
                    f"expected {tuple(layer.gate.weight.shape)}."
                )
            if not torch.isfinite(gates[name]).all():
                raise AdapterError(
                    f"{source}: the gate of {name!r} holds NaN or infinite weights; train the gates again."
                )
        for name, layer in self.layers.items():
            layer.gate.weight.copy_(gates[name])
            layer.forget_packed()

    def add_adapter(self, name: str, source: str | Path) -> None:
        """Add one adapter behind the others; their choices among themselves stay as they are.

        Its gate rows are zero until trained, by ``train_gates`` on data that includes its task; until then tokens choose
        it wherever that is more than the other rows have for them. Where the gates are Arrow's, its rows are too, and
        nothing is left to train. top_k stays what it is, 1 in a model of one adapter; see :meth:`set_top_k`.
        """
        self.require_layers()
        if name in self.adapter_names:
            raise AdapterError(f"there is an adapter {name!r} already; choose another name.")
        adapter = load_adapter(*next(iter(list_adapters({name: source}).items())))
        _check_fit(self.base_model, adapter)
        _warn_of_other_bases(self.base_model, [adapter])
        index = len(self._adapters)
        before = {module: layer.sizes() for module, layer in self.layers.items()}
        self._adapters.append(adapter)
        try:
            for module, layer in self.layers.items():
                layer.add_adapter(adapter.modules.get(module))
            for module in _in_model_order(self.base_model, set(adapter.modules) - set(before)):
                self._wrap(module, {index: adapter.modules[module]})
            link_siblings(self.layers)
            if self.state.absolute_logits:
                set_prototypes(self.layers.values())
        except BaseException:  # out of memory, say: half of the layers with it would be no model at all
            del self._adapters[index:]
            for module in set(self.layers) - set(before):
                self._put(module, self.layers.pop(module).base_layer)
            for module, sizes in before.items():
                self.layers[module].cut_back(sizes)
            link_siblings(self.layers)
            raise
        self._adapters[index] = _without_weights(adapter)
        self.state.adapters = self.adapter_names
        if not self.state.absolute_logits:
            self.state.untrained.add(name)
            self.state.warned = False

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.base_model.get_submodule(parent), child, module)

    def _wrap(self, module: str, weights: dict) -> None:
        linear = self.base_model.get_submodule(module)
        # A quantised layer's weight has an integer or 8-bit type; the model's dtype is what it computes in.
        dtype = linear.weight.dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            dtype = self.base_model.dtype
        layer = MeteoraLinear(
            linear, len(self._adapters), weights, self.state, dtype=dtype, device=_device_of(linear), name=module
        )
        self._put(module, layer)
        layer.train(linear.training)
        self.layers[module] = layer

    def require_layers(self) -> None:
        """Raise ``AdapterError`` after :meth:`unload`: there is nothing left but the base model."""
        if not self.layers:
            raise AdapterError("this model was unloaded; make a new one with from_adapters or from_pretrained.")

    def unload(self) -> nn.Module:
        """Take the layers out again and return the base model as it was. This model is of no use then."""
        self.activation_checkpointing_disable()
        for module, layer in self.layers.items():
            self._put(module, layer.base_layer)
        self.layers.clear()
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        return self.base_model.train(self._was_training)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        return tuple(self._adapters)

    @property
    def adapter_names(self) -> list[str]:
        return [adapter.name for adapter in self._adapters]

    @property
    def top_k(self) -> int:
        return self.state.top_k

    def set_top_k(self, top_k: int) -> None:
        """Mix the ``top_k`` best adapters per token and layer."""
        self.state.top_k = check_top_k(top_k, len(self._adapters))

    def set_temperature(self, temperature: float) -> None:
        """Divide the chosen logits by ``temperature`` before their softmax; above 1 the weights even out."""
        self.state.temperature = check_temperature(temperature)

    def set_least_share(self, share: float) -> None:
        """Give a token no adapter in layers whose gate gives the chosen less than ``share``, of all; 0: always give them."""
        self.state.least_share = check_least_share(share)

    def set_backend(self, backend: str) -> None:
        """Compute the mixture by ``loop``, ``bmm``, ``dense``, ``triton`` or ``auto``."""
        get_mix(backend)
        self.state.backend = backend

    def train(self, mode: bool = True) -> MeteoraModel:
        """Training mode for this module alone: the base model is frozen, and noise in it would only blur the gates.

        It stays in eval mode as a whole, since many models drop out through functions that ask their module's mode.
        """
        super().train(mode)
        self.base_model.eval()
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute decoder layers in the backward pass, instead of keeping what it needs.

        transformers' own switch, whose arguments these are, works in training mode only, in which the base model never
        is. ``use_reentrant`` is always False, as nothing before the first gate has a gradient.

        Raises:
            ValueError: for ``offload``, which there is not, or a model without such layers.
        """
        if offload:
            raise ValueError("activations cannot be offloaded here; leave offload out, and they are recomputed alone.")
        layers = [module for module in self.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(f"{type(self.base_model).__name__} has no layers that could be recomputed; leave it off.")
        self.activation_checkpointing_disable()
        kwargs = activation_checkpointing_kwargs or {}
        self._recomputing = {"activation_checkpointing_kwargs": kwargs, "every_n_layers": every_n_layers}
        options = {**kwargs, "use_reentrant": False}
        for layer in layers[::every_n_layers]:
            self._recomputed[layer] = vars(layer).get("forward")  # accelerate's hooks are of that kind
            layer.forward = partial(_recompute, layer.forward, options)

    def activation_checkpointing_disable(self) -> None:
        """Keep again what :meth:`activation_checkpointing_enable` let go."""
        for layer, before in self._recomputed.items():
            del layer.forward
            if before is not None:
                layer.forward = before
        self._recomputed, self._recomputing = {}, None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping | None = None) -> None:
        """The former name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_activation_checkpointing(self) -> bool:
        return bool(self._recomputed)

    is_gradient_checkpointing = is_activation_checkpointing

    @contextmanager
    def activation_checkpointing(self, wanted: bool) -> Iterator[None]:
        """Inside, decoder layers are recomputed, or not; afterwards it is as before."""
        before = self._recomputing
        if wanted and before is None:
            self.activation_checkpointing_enable()
        elif not wanted:
            self.activation_checkpointing_disable()
        try:
            yield
        finally:
            self.activation_checkpointing_disable()
            if before is not None:
                self.activation_checkpointing_enable(**before)

    def forward(self, *args, **kwargs):
        """The base model's forward and output; its ``loss`` is the language-modelling loss alone."""
        return self.base_model(*args, **kwargs)

    # transformers' Trainer reads there which columns of a data set to keep, and which are labels.
    forward.__signature__ = inspect.signature(
        lambda self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, **kwargs: None
    )

    def generate(self, *args, **kwargs):
        """The base model's ``generate``.

        With ``cache_implementation="static"`` transformers compiles the steps on a GPU; while a trace is recorded, it does not.
        """
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)

        def setting(name: str, default: Any) -> Any:
            """As ``generate`` resolves it: its own argument, else the configuration given, else the model's."""
            sources = (given, self.base_model.generation_config)
            values = [kwargs.get(name)] + [getattr(source, name, None) for source in sources]
            return next((value for value in values if value is not None), default)

        beams = setting("num_beams", 1)
        if self.state.trace is not None:
            if beams > 1:
                raise ValueError("trace cannot follow beam search, which reorders the samples; use num_beams=1.")
            for name in _UNTRACEABLE:
                value = setting(name, None)
                if value not in (None, False) and (name != "guidance_scale" or value != 1):
                    raise ValueError(
                        f"trace cannot follow generation with {name}, as the model then reads other tokens than those of "
                        "the text; leave it out."
                    )
            # Steps with a static cache would be compiled, anew for each that a trace holds, and as CUDA graphs write over
            # what the step before gave the trace.
            if given is None:
                kwargs["disable_compile"] = True
            else:
                given = copy.deepcopy(given)
                given.disable_compile = True
                if len(args) > 1:
                    args = (args[0], given, *args[2:])
                else:
                    kwargs["generation_config"] = given
        if self.state.forced is None:
            return self.base_model.generate(*args, **kwargs)
        self.state.forced.repeats = max(beams, setting("num_return_sequences", 1))
        try:
            return self.base_model.generate(*args, **kwargs)
        finally:
            self.state.forced.repeats = 1

    @property
    def generation_config(self):
        """The base model's, also when it is set."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, config) -> None:
        self.base_model.generation_config = config

    @to_be_entered
    def disable_adapters(self) -> Iterator[None]:
        """Inside, the model is exactly its base model."""
        with self._in_one_thread("enabled", False):
            yield

    @to_be_entered
    def route_to(self, names: str | Sequence[str]) -> Iterator[None]:
        """Inside, every token uses the named adapter alone: one name for all samples, or a list with one per sample.

        The gates, top_k and the temperature are ignored. The output is PEFT's own for that adapter.
        """
        self.require_layers()
        try:
            wanted = [names] if isinstance(names, str) else list(names)
        except TypeError:
            kind = type(names).__name__
            raise AdapterError(f"route_to takes a name, or a list of one name for each sample, not a {kind}.") from None
        known = {name: n for n, name in enumerate(self.adapter_names)}
        for name in wanted:
            if name not in known:
                raise AdapterError(f"there is no adapter {name!r}; there are {', '.join(map(repr, known))}.")
        if not wanted:
            raise AdapterError("route_to needs at least one name.")
        device = next((layer.gate.weight.device for layer in self.layers.values()), None)
        indices = [known[name] for name in wanted]
        with self._in_one_thread("forced", ForcedAdapters(indices, one_for_all=isinstance(names, str), device=device)):
            yield

    @to_be_entered
    def trace(self) -> Iterator[Trace]:
        """Inside, every gate's logits, choices and weights are recorded; see :class:`Trace`."""
        self.require_layers()
        trace = Trace()
        with self._in_one_thread("trace", trace):
            yield trace

    @contextmanager
    def _in_one_thread(self, name: str, value: Any) -> Iterator[None]:
        """Inside, the state's ``name`` is ``value``, for one thread at a time; contexts may be left in any order."""
        state, mine = self.state, [threading.get_ident(), name, None]
        with _ENTERING:
            if any(thread != mine[0] for thread, *_ in state.inside):
                raise RuntimeError(
                    "another thread, or a generator that another one began, is inside route_to, disable_adapters or trace of "
                    "this model; let one thread at a time in (a lock), or call the model once with a list of names."
                )
            mine[2] = getattr(state, name)
            state.inside.append(mine)
            setattr(state, name, value)
        try:
            yield
        finally:
            with _ENTERING:
                n = next(n for n, entered in enumerate(state.inside) if entered is mine)
                later = next((entered for entered in state.inside[n + 1 :] if entered[1] == name), None)
                if later is None:
                    setattr(state, name, mine[2])
                else:  # what was before this one is what will be behind that one
                    later[2] = mine[2]
                del state.inside[n]

    def merge_adapter(self, *args, **kwargs):
        """Refused: the routing depends on the input."""
        raise NotImplementedError(_REFUSE_MERGE)

    merge_and_unload = merge_adapter

    def load_adapter(self, *args, **kwargs):
        """Refused, as the other names by which transformers puts adapters of PEFT into a base model are."""
        raise NotImplementedError(_REFUSE_PEFT)

    set_adapter = enable_adapters = delete_adapter = active_adapters = load_adapter

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _recompute(forward: Callable, options: Mapping, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # The backward pass would write to a cache once more.
    without = {"use_cache": False, "past_key_values": None, "past_key_value": None, "layer_past": None}
    kwargs |= {name: value for name, value in without.items() if name in kwargs}
    return checkpoint(forward, *args, **options, **kwargs)


def _load_base(base_model: nn.Module | str | Path) -> nn.Module:
    if isinstance(base_model, nn.Module):
        return base_model
    if not isinstance(base_model, (str, Path)):
        check_untouched(base_model)
    directory = Path(base_model).expanduser()
    try:
        return AutoModelForCausalLM.from_pretrained(str(directory if directory.is_dir() else base_model), dtype="auto")
    except HUB_ERRORS as error:  # transformers turns the hub's into an OSError of its own
        if directory.is_dir() or not is_absence(error):
            raise
        raise AdapterError(f"base model: {absence(base_model, error)}") from error


def _without_weights(adapter: Adapter) -> Adapter:
    """The layers hold the weights, and a second copy is kept only of those that no file holds."""
    return adapter if adapter.in_memory else replace(adapter, modules={})


def _device_of(linear: nn.Linear) -> torch.device:
    """Where a layer computes: where its weight lies or, if accelerate offloads it, where it is brought for that."""
    if linear.weight.device.type != "meta":
        return linear.weight.device
    hook = getattr(linear, "_hf_hook", None)
    devices = [h.execution_device for h in getattr(hook, "hooks", [hook]) if hasattr(h, "execution_device")]
    if not devices:
        raise AdapterError("the base model has no weights (it lies on the meta device); load it with its weights.")
    return torch.device(devices[0])


def check_untouched(base_model: nn.Module) -> None:
    """Raise ``AdapterError`` for what is no model, or one that carries adapters already."""
    if not isinstance(base_model, nn.Module):
        raise AdapterError(f"the base model must be a model of transformers, not a {type(base_model).__name__}.")
    for name, module in base_model.named_modules():
        if isinstance(module, MeteoraLinear):
            raise AdapterError(f"the base model carries adapters already (at {name!r}); load it afresh.")
        if isinstance(module, BaseTunerLayer):
            raise AdapterError(
                f"the base model carries adapters of PEFT (at {name!r}); unload them (`base = model.unload()`), and give "
                "their directory instead."
            )


def _in_model_order(base_model: nn.Module, modules: set[str]) -> list[str]:
    return [name for name, _ in base_model.named_modules() if name in modules]


def _check_fit(base_model: nn.Module, adapter: Adapter) -> None:
    known = dict(base_model.named_modules())
    for name, weights in adapter.modules.items():
        module = known.get(name)
        if isinstance(module, MeteoraLinear):
            module = module.base_layer
        if module is None and ".experts." in name:
            raise AdapterError(
                f"adapter {adapter.name!r} adapts {name!r}, an expert, which the base model holds in one tensor with "
                "the others; only nn.Linear can be mixed."
            )
        if module is None:
            raise AdapterError(
                f"adapter {adapter.name!r} has weights for {name!r}, which the base model does not have; "
                "it was trained for another base model."
            )
        if not isinstance(module, nn.Linear):
            raise AdapterError(
                f"adapter {adapter.name!r} adapts {name!r}, a {type(module).__name__}; only nn.Linear can be mixed."
            )
        expected, actual = (module.in_features, module.out_features), (weights.A.shape[1], weights.B.shape[0])
        if expected != actual:
            raise AdapterError(
                f"adapter {adapter.name!r} expects {name!r} to be {actual[0]} -> {actual[1]}, the base model's is "
                f"{expected[0]} -> {expected[1]}; it was trained for another base model."
            )


def _warn_of_other_bases(base_model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """One warning for all adapters of one other name: a base model that lies in a folder is called by it."""
    base_name = getattr(getattr(base_model, "config", None), "_name_or_path", "") or ""
    others: dict[str | None, list[str]] = {}
    for adapter in adapters:
        if adapter.base_model is None or Path(adapter.base_model).name != Path(base_name).name:
            others.setdefault(adapter.base_model, []).append(repr(adapter.name))
    for said, names in others.items():
        one = len(names) == 1
        logger.warning(
            "%s trained for %r, the base model is %r; the shapes fit, so %s used.",
            f"adapter {names[0]} says it was" if one else f"{len(names)} adapters say they were", said, base_name,
            "it is" if one else "they are",
        )  # fmt: skip
