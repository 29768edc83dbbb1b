"""Attention that is given no mask: causal, and within each of the texts of a row."""

import copy

import pytest
import torch
from torch.utils import deterministic
from transformers import GPT2Config, GPT2LMHeadModel, masking_utils

from meteora.attention import (
    _flash_can, _same_gradients_always, algorithms_as_before, one_row_of, takes_texts_in_a_row, without_masks,
)  # fmt: skip
from meteora.batches import Texts, collate, encode
from meteora.recording import Recordings
from meteora.training_loop import response_losses

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_attention_without_masks_is_causal_all_the_same(core, tiny_llama, monkeypatch):
    samples = encode(core.rows(count=3), {"one": 0, "two": 1}, core.Tokenizer(), 100)
    batch = collate(samples, 2, CPU)
    expected = response_losses(tiny_llama, batch)
    looked = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *a: looked.append(a))
    with without_masks(tiny_llama, False):
        response_losses(tiny_llama, batch)
    assert looked, "transformers looks for packed texts as long as its attention is its own"
    looked.clear()
    with without_masks(tiny_llama, True):
        torch.testing.assert_close(response_losses(tiny_llama, batch), expected)
    assert not looked and tiny_llama.config._attn_implementation == "sdpa"


def in_one_row(model, texts, filling=0, bounds=0):
    """The logits of each of ``texts`` when they share a row, with so many tokens and empty texts behind them."""
    device = next(model.parameters()).device
    row = torch.cat([*texts, torch.full((filling,), 3)])[None].to(device)
    ends = torch.tensor([0, *map(len, texts), filling, *[0] * bounds]).cumsum(0).int().to(device)
    longest = max(filling, *map(len, texts))
    with without_masks(model, True), one_row_of(Texts(ends, longest), row) as positions, torch.no_grad():
        logits = model(input_ids=row, use_cache=False, **positions).logits[0]
    return logits[: len(row[0]) - filling].split([*map(len, texts)])


def texts_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize(("filling", "bounds"), [(0, 0), (9, 0), (4, 3)])
def test_texts_in_a_row_are_as_if_alone(tiny_llama, filling, bounds):
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).eval()
    texts = texts_of(7, 1, 12, 3)
    for model in (tiny_llama, gpt):
        for text, found in zip(texts, in_one_row(model, texts, filling, bounds), strict=True):
            with torch.no_grad():
                torch.testing.assert_close(found, model(text[None]).logits[0])


def test_each_token_knows_its_text():
    texts = Texts(torch.tensor([0, 2, 3, 7, 7, 7], dtype=torch.int32), 4)
    begins, ends = texts.of_tokens(7)
    assert begins.tolist() == [0, 0, 2, 3, 3, 3, 3] and ends.tolist() == [2, 2, 3, 7, 7, 7, 7]


def test_an_attention_that_takes_no_texts_is_an_error(tiny_llama):
    row, texts = torch.ones(1, 3, dtype=torch.long), Texts(torch.tensor([0, 1, 3], dtype=torch.int32), 2)
    with pytest.raises(RuntimeError, match="load it with 'eager' attention"), one_row_of(texts, row) as positions:
        tiny_llama(input_ids=row, use_cache=False, **positions)
    with one_row_of(None, row) as positions:
        assert not positions


def test_there_is_a_kernel_for_16_bits_on_a_gpu(tiny_llama, monkeypatch):
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    half = copy.deepcopy(tiny_llama).to(torch.bfloat16)
    assert takes_texts_in_a_row(half, GPU)
    assert not takes_texts_in_a_row(half, CPU) and not takes_texts_in_a_row(tiny_llama, GPU)
    half.gradient_checkpointing_enable()
    assert takes_texts_in_a_row(half, GPU) and not takes_texts_in_a_row(half.train(), GPU)
    half.gradient_checkpointing_disable()
    capability[0] = (7, 5)
    assert not takes_texts_in_a_row(half, GPU)


def test_other_heads_and_wishes_are_served_by_a_mask():
    class Query:
        is_cuda, dtype = True, torch.float16

        def __init__(self, size):
            self.shape = (1, 2, 9, size)

    plain = {"dropout": 0.0, "scaling": 0.1, "is_causal": None}
    assert _flash_can(Query(64), Query(64), plain)
    assert not any(_flash_can(Query(size), Query(size), plain) for size in (60, 264))
    assert not _flash_can(Query(192), Query(128), plain)
    for wish in ({"dropout": 0.1}, {"softcap": 30.0}, {"is_causal": False}):
        assert not _flash_can(Query(64), Query(64), plain | wish)


class Watched(torch.autograd.Function):
    """The sum of two tensors; whether algorithms have to be deterministic in its backward pass is in ``seen``."""

    seen = []

    @staticmethod
    def forward(ctx, first, second):
        return first + second

    @staticmethod
    def backward(ctx, gradient):
        Watched.seen.append((torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory))
        return gradient, gradient


def state():
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only, deterministic.fill_uninitialized_memory


def test_gradients_are_computed_by_algorithms_that_give_the_same_bits():
    Watched.seen.clear()
    x, y = (torch.ones(3, requires_grad=wanted) for wanted in (True, False))
    for enabled, warn_only in ((False, False), (True, True)):
        with algorithms_as_before():
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            inner = Watched.apply(x * 2, y)
            _same_gradients_always(inner)
            (Watched.apply(inner, x) * 3).sum().backward()
            assert state() == (enabled, warn_only, True)
    assert Watched.seen == [(False, True), (True, False), (True, True), (True, False)]
    assert x.grad.tolist() == [18.0] * 3 and state() == (False, False, True)
    _same_gradients_always(Watched.apply(y, y))  # of which no gradient is wanted


def test_a_backward_pass_that_breaks_off_changes_no_algorithms():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            assert state() == (True, False, False)
            raise RuntimeError("out of memory")

    result = Broken.apply(torch.ones(3, requires_grad=True))
    _same_gradients_always(result)
    with pytest.raises(RuntimeError, match="out of memory"), algorithms_as_before():
        result.sum().backward()
    assert state() == (False, False, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_recorded_pass_gives_the_bits_of_a_plain_one(tiny_llama):
    model = tiny_llama.to(GPU, torch.bfloat16)
    weight = model.model.layers[0].self_attn.q_proj.weight
    rows = torch.randint(3, 64, (5, 1, 4096), generator=torch.Generator().manual_seed(0)).to(GPU)
    row, bounds = rows[0].clone(), torch.arange(0, 4097, 256, dtype=torch.int32, device=GPU)
    weight.grad = torch.zeros_like(weight)

    def one_pass():
        with algorithms_as_before(), one_row_of(Texts(bounds, 512), row) as positions:
            model(input_ids=row, use_cache=False, **positions).logits.float().square().mean().backward()

    def gradients(run):
        found = []
        for n, values in enumerate(rows):
            row.copy_(values)
            if n == 4:  # other texts than those that were recorded
                bounds.copy_(torch.tensor([0, *[100, 412] * 8], device=GPU).cumsum(0))
            run()
            found.append(weight.grad.clone())
            weight.grad.zero_()
        return found

    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)
    begin = bounds.clone()
    with without_masks(model, True):
        plain = gradients(one_pass)
        bounds.copy_(begin)
        with Recordings(GPU, "a pass") as recordings:
            recorded = gradients(lambda: recordings.run("key", one_pass, rehearsal=lambda: None))
            assert recordings._graphs["key"] is not None
    assert all(map(torch.equal, plain, recorded)) and not torch.equal(plain[0], plain[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
def test_the_kernels_gradients_are_the_same_bits_every_time(tiny_llama):
    model = tiny_llama.to(GPU, torch.bfloat16)
    row = torch.randint(3, 64, (1, 8192), generator=torch.Generator().manual_seed(0)).to(GPU)
    bounds = torch.arange(0, 8193, 512, dtype=torch.int32, device=GPU)
    found = []
    for _ in range(4):
        model.zero_grad()
        with without_masks(model, True), one_row_of(Texts(bounds, 512), row) as positions:
            model(input_ids=row, use_cache=False, **positions).logits.float().square().mean().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert found[0].abs().sum() > 0 and all(torch.equal(gradient, found[0]) for gradient in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
def test_the_kernel_computes_what_a_mask_gives(tiny_llama):
    texts = texts_of(70, 1, 129, 33)
    model = tiny_llama.to(GPU)
    expected = in_one_row(model, texts, 40, 5)
    model.to(torch.bfloat16)
    for text, alone, found in zip(texts, expected, in_one_row(model, texts, 40, 5), strict=True):
        with torch.no_grad():
            plain = model(text[None].to(GPU)).logits[0]
        assert (found - alone).norm() <= 1.5 * (plain - alone).norm(), "no further off than plain attention in 16 bits"
