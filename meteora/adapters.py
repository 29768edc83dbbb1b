"""Off-the-shelf LoRA adapters: unmodified PEFT directories, read, checked and refused by name where they do not fit."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from meteora.hub import HUB_ERRORS, absence

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

# Options of PEFT's LoraConfig under which an adapter is more, or other, than B A x: adding its A and B alone would be
# silently wrong.
_UNSUPPORTED_OPTIONS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# These initialisations change the base weights at the start of training, so the adapter fits only that changed base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

# Options of one module: the adapter's own, and that by which PEFT gives some modules others.
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


class AdapterError(ValueError):
    """An adapter that cannot be used, or does not fit; the message names the adapter and the mend."""


@dataclass(frozen=True)
class LoraWeights:
    """One adapter's update of one linear layer: ``scaling * B @ A``, A (r, in), B (out, r)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Adapter:
    """One adapter: its name, where it lies, the sha256 of its files, and ``modules``: dotted name -> weights.

    ``source`` is a hub id, or the absolute path ``directory``. ``in_memory``: its weights are in ``modules`` alone, and what
    lies in ``directory`` is an earlier version of them.
    """

    name: str
    source: str
    directory: Path
    sha256: str
    base_model: str | None
    modules: dict[str, LoraWeights]
    in_memory: bool = False
    config_sha256: str = ""


def list_adapters(adapters: Mapping[str, str | Path] | str | Path) -> dict[str, str]:
    """Name -> directory or hub id, from such a mapping or from one folder that holds PEFT directories.

    Raises:
        AdapterError: if there is none, a name is empty, or two folders stand for one name.
    """
    if isinstance(adapters, (str, Path)):
        folder = Path(adapters).expanduser()
        if not folder.is_dir():
            raise AdapterError(f"{folder} is not a folder; give a folder of PEFT directories, or a dict name -> path.")
        if (folder / CONFIG_FILE).is_file():
            raise AdapterError(
                f"{folder} is a PEFT directory itself; give a dict name -> path, with those of folders inside it, if any."
            )
        # Names never begin with a dot (adapter_directory escapes it): such a folder is one being written.
        folders = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}")) if path.parent.name[0] != "."]
        found: dict[str, str] = {}
        for path in folders:
            name = unquote(path.name)
            if name in found:
                raise AdapterError(
                    f"{folder} holds two folders for an adapter {name!r}, {Path(found[name]).name!r} and "
                    f"{path.name!r}; rename one, or move it away."
                )
            found[name] = str(path)
        # Such as what a training left in checkpoint-100, beside which nobody put the best.
        below = (path.parent for path in sorted(folder.glob(f"*/*/{CONFIG_FILE}")))
        deeper = [str(path.relative_to(folder)) for path in below if path.parent not in folders and path.parent.name[0] != "."]
        if deeper:
            names = ", ".join(deeper)
            logger.warning("%s lies too deep in %s and is left out; give a dict name -> path to use it.", names, folder)
        if not found:
            raise AdapterError(f"{folder} holds no PEFT directory (none of its folders has an {CONFIG_FILE}).")
        return found
    if not adapters:
        raise AdapterError("no adapters given; a mixture needs at least one.")
    if not isinstance(adapters, Mapping):
        raise AdapterError(
            "adapters must be a dict name -> directory or hub id, or one folder of PEFT directories, not a "
            f"{type(adapters).__name__}."
        )
    for name, source in adapters.items():
        check_name(name)
        if not isinstance(source, (str, Path)):
            raise AdapterError(
                f"adapter {name!r} must be given by its directory or hub id, not as a {type(source).__name__}."
            )
    return {name: str(source) for name, source in adapters.items()}


def check_name(name: object) -> None:
    """Raise ``AdapterError`` for what is no name of an adapter."""
    if not isinstance(name, str) or not name:
        raise AdapterError(f"an adapter's name must be a non-empty string, not {name!r}.")


def adapter_directory(folder: str | Path, name: str) -> Path:
    """Where in ``folder`` the adapter ``name`` lies: its name, percent-encoded where a file name may not hold it."""
    encoded = quote(name, safe=" ")
    return Path(folder) / ("%2E" + encoded[1:] if encoded.startswith(".") else encoded)


def load_adapter(name: str, source: str | Path) -> Adapter:
    """Read the PEFT LoRA adapter in directory (or hub repository) ``source``.

    Raises:
        AdapterError: if it is missing, unreadable, not a plain LoRA, or holds NaN or infinite weights.
    """
    directory = _locate(name, str(source))
    config = _read_config(name, directory)
    weights = directory / WEIGHTS_FILE
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise AdapterError(f"adapter {name!r}: {weights} is corrupt ({error}); copy or download it again.") from error
    return Adapter(
        name=name,
        source=str(directory) if Path(source).expanduser().is_dir() else str(source),
        directory=directory,
        sha256=file_sha256(weights),
        config_sha256=file_sha256(directory / CONFIG_FILE),
        base_model=config.get("base_model_name_or_path") or None,
        modules=_read_modules(name, config, tensors),
    )


def peft_tensors(modules: Mapping[str, LoraWeights], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's weights file for ``modules``, on the CPU and, if given, of ``dtype``."""
    tensors = {}
    for module, pair in modules.items():
        for half, tensor in (("lora_A", pair.A), ("lora_B", pair.B)):
            tensors[f"{PEFT_PREFIX}{module}.{half}.weight"] = tensor.to("cpu", dtype).contiguous()
    return tensors


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locate(name: str, source: str) -> Path:
    directory = Path(source).expanduser().absolute()
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(source, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
        except (*HUB_ERRORS, HFValidationError) as error:
            raise AdapterError(f"adapter {name!r}: {absence(source, error)}") from error
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise AdapterError(
                f"adapter {name!r}: {directory} has no {file}; it must be what PEFT's save_pretrained writes "
                "(pickled .bin weights are not read: save them again as safetensors)."
            )
    return directory


def _read_config(name: str, directory: Path) -> dict:
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"adapter {name!r}: {directory / CONFIG_FILE} is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise AdapterError(f"adapter {name!r}: {directory / CONFIG_FILE} is not a PEFT configuration.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"adapter {name!r} is of type {config.get('peft_type')!r}; only LORA adapters can be mixed.")
    for option in _UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise AdapterError(
                f"adapter {name!r} uses {option}={config[option]!r}, which a mixture of LoRAs cannot add."
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"adapter {name!r} uses bias={config['bias']!r}; only bias='none' can be mixed.")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"adapter {name!r} was initialised by {init!r}, which changes the base model; convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) first."
        )
    _check_numbers(name, directory / CONFIG_FILE, config)
    return config


def _check_numbers(name: str, file: Path, config: dict) -> None:
    mend = "save the adapter again with PEFT's save_pretrained."
    for option, pattern in _PATTERNS.items():
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"adapter {name!r}: {file} has {pattern}={patterns!r}, which must be an object; {mend}")
        values = {option: _own(config, option), **{f"{pattern}[{key!r}]": value for key, value in patterns.items()}}
        for key, value in values.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (option == "r" and value < 1):
                raise AdapterError(
                    f"adapter {name!r}: {file} has {key}={value!r}, which must be a "
                    f"{'positive' if option == 'r' else 'finite'} number; {mend}"
                )


def _read_modules(name: str, config: dict, tensors: dict[str, torch.Tensor]) -> dict[str, LoraWeights]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, half = key.removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            mend = ""
            if ".base_layer." in key:
                mend = " PEFT wrote the base model's weights beside them; save it with save_embedding_layers=False."
            raise AdapterError(
                f"adapter {name!r} holds {key!r}; only lora_A and lora_B of linear layers can be mixed.{mend}"
            )
        halves.setdefault(module.removeprefix(PEFT_PREFIX), {})[half] = tensor
    if not halves:
        raise AdapterError(f"adapter {name!r} holds no weights.")
    modules = {}
    for module, pair in halves.items():
        if len(pair) != 2:
            raise AdapterError(f"adapter {name!r}: module {module!r} has only {next(iter(pair))}; A and B are needed.")
        A, B = pair["lora_A"], pair["lora_B"]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"adapter {name!r}: module {module!r} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}; "
                "expected (r, in) and (out, r)."
            )
        if not (_finite(A) and _finite(B)):
            raise AdapterError(f"adapter {name!r}: module {module!r} holds NaN or infinite weights.")
        rank, alpha = (_module_option(config, option, module) for option in ("r", "lora_alpha"))
        if rank != A.shape[0]:
            raise AdapterError(
                f"adapter {name!r}: module {module!r} has rank {A.shape[0]}, but {CONFIG_FILE} says {rank}; "
                "the two files do not belong together."
            )
        modules[module] = LoraWeights(A, B, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
    return modules


def _finite(weights: torch.Tensor) -> bool:
    """Whether all are. The extremes pass NaN on, and take a CPU a twentieth of the time of asking each number in bf16."""
    if weights.numel() and weights.dtype in (torch.float32, torch.float16, torch.bfloat16):
        weights = torch.stack(torch.aminmax(weights))
    return bool(torch.isfinite(weights).all())


def _module_option(config: dict, option: str, module: str) -> float:
    """The ``r`` or ``lora_alpha`` of one module: PEFT's pattern where one fits its name, else the adapter's own."""
    patterns = config.get(_PATTERNS[option]) or {}
    return patterns.get(get_pattern_key(patterns.keys(), module), _own(config, option))


def _own(config: dict, option: str) -> float:
    return config.get(option, 8)  # PEFT's default of both
