"""Settings of every test process, and what the tests of the core share."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager
from types import SimpleNamespace

# Without a GPU the Triton kernels are tested in Triton's interpreter. It has to be chosen before anything imports Triton,
# as torch does, so torch cannot be asked whether there is a GPU.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from meteora import passes

# The models are tiny, and several test processes run at once.
torch.set_num_threads(1)

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def seeded():
    """Whatever ran before, a test draws the same numbers."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def products_add_up_one_by_one():
    """In Triton's interpreter a sum depends neither on the CPU nor on the matrices' sizes, as it does not on a GPU.

    numpy leaves matrix products to a BLAS, which cuts and orders the sums by both. `einsum` does not, and in doubles, which
    hold each product whole, what order it adds in is lost when the sum is rounded.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *_):
        product = np.einsum("ik,kj->ij", a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_looked_up_again():
    """More than a third of the time that Triton's interpreter takes for kernels as small as the tests' goes into two things.

    Each call of a helper, `tl.sum` as well, patches the whole language anew, though after a kernel's start, and the first
    call into a module, nothing is left to patch. And each operation makes a dictionary of all dtypes to look up one.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    patch_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()  # the modules of the running kernel's functions
    find_dtype, dtypes = interpreter._get_np_dtype, {}

    def patch_once(function):
        if function.__module__ in patched:
            return None  # a helper's call asks for nothing; a kernel's start, which does, comes first
        patched.add(function.__module__)
        return patch_language(function)

    def launch_anew(*args, **options):
        patched.clear()  # the last kernel took back at its end what had been patched
        return launch(*args, **options)

    def known_dtype(of):
        of = of.scalar  # a block's elements have its dtype
        if of.name not in dtypes:
            dtypes[of.name] = find_dtype(of)
        return dtypes[of.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter, "_get_np_dtype", known_dtype)
        yield


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of two layers, hidden size 32, vocabulary 64, the same one every time."""
    return _llama()


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def make_adapter(directory, base_model, *, seed=0, dtype=torch.float32, **options):
    """Write a PEFT adapter with random A and B for ``base_model`` (left as it is), and return its directory."""
    torch.manual_seed(1000 + seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, **options}
    model = peft.get_peft_model(copy.deepcopy(base_model), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(str(directory), save_embedding_layers=False)
    return directory


class CharacterTokenizer:
    """One id a character; the pad id is the end-of-text id, as it is with SmolLM2."""

    eos_token_id = pad_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [3 + ord(character) % 61 for character in text]}


class NothingWaits(TorchDispatchMode):
    """Raises where the CPU would wait for a value of the GPU, or new values would have to be copied to it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "lift_fresh")
        return operation(*args, **(kwargs or {}))


class Repeated(AbstractContextManager):
    """In place of `Recordings`: every step is just run, the first time of a key after its rehearsal."""

    def __init__(self, device, name):
        self.keys = []  # of all runs

    def run(self, key, step, *, rehearsal):
        if key not in self.keys:
            rehearsal()
        self.keys.append(key)
        with NothingWaits():
            step()

    def __exit__(self, *_):
        pass


def repeat_recordings(monkeypatch, module):
    """Let the trainings of ``module`` take any model for one that can be recorded; the list of what they then use."""
    made = []
    monkeypatch.setattr(module, "Recordings", lambda *args: made.append(Repeated(*args)) or made[-1])
    monkeypatch.setattr(module, "can_be_recorded", lambda model, device: True)
    monkeypatch.setattr(module, "takes_texts_in_a_row", lambda model, device: True, raising=False)
    return made


def watch_recordings(monkeypatch):
    """How many graphs each training has made, once it has ended; of models in 32 bits, too, which are compared better."""
    made = []
    monkeypatch.setattr(passes, "takes_texts_in_a_row", lambda model, device: device.type == "cuda")

    class Watched(passes.Recordings):
        def __exit__(self, *_):
            made.append(sum(graph is not None for graph in self._graphs.values()))
            super().__exit__(*_)

    monkeypatch.setattr(passes, "Recordings", Watched)
    return made


@pytest.fixture(scope="session")
def collected():
    """A function that leaves in a workspace what notebooks 01 and 02 do, with gates that were never trained."""
    from data_prep.base_models import load_base_model
    from data_prep.prepare import load_split, prepare_tasks
    from meteora import MeteoraModel
    from meteora.study.collection import collect_adapters, write_index

    def leave(workspace, train):
        profile = workspace.profile
        prepare_tasks(profile.tasks, workspace.data, sizes={"train": train, "valid": 4, "test": 6})
        base, tokenizer = load_base_model(profile.model.source)
        splits = [{task: load_split(workspace.data, task, part) for task in profile.tasks} for part in ("train", "valid")]
        collection = collect_adapters(workspace, base, tokenizer, *splits)
        write_index(workspace, collection)
        MeteoraModel.from_adapters(base, collection.tasks).save_pretrained(workspace.gates)
        workspace.write_csv("gate_training.csv", [{"step": 1}])
        return workspace

    return leave


@pytest.fixture(scope="session")
def core():
    """Helpers of the core's tests, as a fixture because test modules cannot import one another."""

    def randomize_gates(model, seed=0, std=1.0):
        generator = torch.Generator().manual_seed(seed)
        for layer in model.layers.values():
            layer.gate.weight.data.normal_(std=std, generator=generator)
        return model

    def tokens(batch=3, length=7, seed=0):
        return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))

    def rows(tasks=("one", "two"), count=6):
        return [
            {"task": task, "prompt": f"{task} {n}? ", "response": (task[0] * 3 + "!")[: 1 + n % 4]}
            for task in tasks
            for n in range(count)
        ]

    return SimpleNamespace(
        make_adapter=make_adapter, randomize_gates=randomize_gates, tokens=tokens, rows=rows,
        Tokenizer=CharacterTokenizer, all_linear=ALL_LINEAR,
        Repeated=Repeated, repeat_recordings=repeat_recordings, watch_recordings=watch_recordings,
    )  # fmt: skip


@pytest.fixture(scope="session")
def mixed_adapters(tmp_path_factory):
    """Four adapters of ``tiny_llama`` that differ in whatever PEFT lets differ: name -> directory."""
    base = _llama()
    folder = tmp_path_factory.mktemp("adapters")
    options = {
        "one": {},
        "two. with/odd names ü": {"r": 2, "lora_alpha": 3, "use_rslora": True},
        "three": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3},
        "four": {
            "target_modules": r".*layers\.1\..*(k_proj|o_proj|up_proj)",
            "rank_pattern": {"up_proj": 6},
            "alpha_pattern": {r"layers\.1\.self_attn\.k_proj": 1},
        },
    }
    return {
        name: str(make_adapter(folder / str(n), base, seed=n, **option))
        for n, (name, option) in enumerate(options.items())
    }
