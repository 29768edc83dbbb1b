"""Rows that samples share: each sample in one of them; neither neighbours nor filling change losses or gradients."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meteora import MeteoraModel
from meteora.attention import without_masks
from meteora.batches import IGNORE, Sample, collate, encode
from meteora.config import TrainingConfig
from meteora.packed_batches import packed_batches, packed_groups
from meteora.passes import Passes, adapter_inputs, gate_inputs, weighted_losses
from meteora.training_loop import response_losses

CPU = torch.device("cpu")


def samples_of(lengths):
    return [Sample([3] * n, [False] * (n - 1) + [True], [n % 2] * n) for n in lengths]


@given(st.lists(st.integers(2, 500), min_size=1, max_size=120), st.sampled_from([500, 777, 1000, 4096]))
def test_every_sample_is_in_one_row_that_holds_it(lengths, size):
    samples = samples_of(lengths)
    groups = packed_groups(samples, size, 500)
    placed = [sample for group, _ in groups for sample in group]
    assert sorted(map(id, placed)) == sorted(map(id, samples))
    for group, tokens in groups:
        assert tokens == size or (tokens == size // 2 >= 500)
        assert sum(len(sample.ids) for sample in group) <= tokens


def test_a_sample_that_no_row_may_hold_is_an_error():
    with pytest.raises(ValueError, match="a sample has 600 tokens, more than longest=500"):
        packed_groups(samples_of([3, 600]), 500, 500)


def test_rows_are_nearly_full_and_alike():
    lengths = torch.randint(20, 500, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = packed_groups(samples_of(lengths), 16384, 500)
    assert sum(tokens for _, tokens in groups) - sum(lengths) <= 8192
    counts = [len(group) / tokens for group, tokens in groups]
    assert max(counts) < 1.2 * min(counts)
    assert [tokens for _, tokens in packed_groups(samples_of([20] * 5), 16384, 500)] == [8192]


PIECES = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 2)), min_size=1, max_size=6)


def turns_of(sample):
    """Lengths of a sample's turns, token by token. What it begins with is a prompt."""
    lengths = [1]
    for n in range(1, len(sample.ids)):
        answered = n > 1 and sample.is_response[n - 1] and not sample.is_response[n]
        lengths += [0] if answered or sample.tasks[n] != sample.tasks[n - 1] else []
        lengths[-1] += 1
    return lengths


@given(st.lists(PIECES, min_size=1, max_size=8), st.sampled_from([None, 36, 64, 300]))
def test_tokens_know_the_length_of_their_turn(texts, size):
    """In rows that texts share, and in padded batches; also texts that end with a prompt or begin with a response."""
    samples = []
    for number, pieces in enumerate(texts, 10):
        responses, tasks = ([piece[part] for piece in pieces for _ in range(piece[0])] for part in (1, 2))
        samples.append(Sample([number] * len(tasks), responses, tasks))
    assert [sample.turns for sample in samples] == [len(turns_of(sample)) for sample in samples]
    packed = (row for row, _ in packed_batches(samples, size, 36, 2)) if size else [collate(samples, 2, CPU)]
    found = {}
    for batch in packed:
        tokens = zip(batch.input_ids.flatten().tolist(), batch.turn_lengths().flatten().tolist(), strict=True)
        for number, length in tokens:
            found.setdefault(number, []).append(length)
    for sample in samples:
        assert found[sample.ids[0]] == [turn for turn in turns_of(sample) for _ in range(turn)]


@pytest.mark.parametrize("size", [64, 150, 512])
def test_a_row_holds_its_samples_and_what_fills_it_does_not_count(core, size):
    samples = encode(core.rows(count=3), {"one": 0, "two": 1}, core.Tokenizer(), 100)
    longest = max(len(sample.ids) for sample in samples)
    predicted, tokens, total = 0, 0, 0
    for batch, places in packed_batches(samples, size, longest, 2):
        row, bounds = batch.input_ids[0], batch.texts.bounds.tolist()
        assert batch.input_ids.shape[0] == 1 and bounds[0] == 0 and bounds[-1] == len(row)
        assert all(0 <= end - begin <= longest for begin, end in zip(bounds, bounds[1:]))
        assert len(bounds) - 1 == 1 << (len(bounds) - 2).bit_length(), "a power of two of texts"
        held = [row[begin:end].tolist() for begin, end in zip(bounds, bounds[1:])][: len(batch.tasks)]
        assert all(any(ids == sample.ids for sample in samples) for ids in held)
        real = batch.attention_mask.sum().item()
        assert real == sum(map(len, held)) and row[real:].tolist() == [2] * (len(row) - real)

        inputs = adapter_inputs(batch, {0: 9, 1: 9}, 2, places)
        assert inputs.shape == (1, len(row), places, len(bounds) - 1) and places >= len(row) // 8
        counted = (inputs.shares > 0).sum().item()
        assert counted == (batch.labels != IGNORE).sum()
        assert (inputs.own == -1).sum() == len(row) - real
        gates = gate_inputs(batch, batch.attention_mask.float(), 0.5, places)
        assert gates.shares.sum() == 0.5 * counted
        assert not gates.without_effect().weights.any() and not gates.without_effect().shares.any()
        predicted, tokens, total = predicted + counted, tokens + real, total + len(batch.tasks)
    assert total == len(samples) and tokens == sum(len(sample.ids) for sample in samples)
    assert predicted == sum(sample.response_tokens for sample in samples)


def test_no_text_predicts_the_first_token_of_the_next():
    cut = Sample([5, 6, 7], [True, False, True], [0, 0, 0])  # its prompt's beginning is lost
    (batch, _), = packed_batches([cut, cut], 6, 3, 2)
    assert batch.labels.tolist() == [[5, IGNORE, 7, IGNORE, IGNORE, 7]]  # there is nothing before the very first


def model_and_samples(core, tiny_llama, tmp_path):
    paths = {name: core.make_adapter(tmp_path / name, tiny_llama, r=3, seed=n) for n, name in enumerate(("one", "two"))}
    model = MeteoraModel.from_adapters(tiny_llama, paths)
    rows = core.rows(count=5) + [{"task": "two", "prompt": "long " * 20, "response": "ok"}]
    return model, encode(rows, {"one": 0, "two": 1}, core.Tokenizer(), 200)


@pytest.mark.parametrize("size", [100, 300, 4096])
def test_losses_and_gradients_are_those_of_plain_batches(core, tiny_llama, tmp_path, size):
    model, samples = model_and_samples(core, tiny_llama, tmp_path)
    parameters = [p.requires_grad_(True) for layer in model.layers.values() for p in (layer.lora_A, layer.lora_B)]
    responses = {task: sum(s.response_tokens for s in samples if s.task == task) for task in (0, 1)}

    batch = collate(samples, 2, CPU)
    tasks = torch.tensor(batch.tasks)
    model.state.own = torch.nn.functional.one_hot(batch.token_tasks, 2).float()
    parts = response_losses(model, batch) / torch.tensor([responses[task] for task in batch.tasks])
    parts.sum().backward()
    expected = torch.zeros(2).index_add(0, tasks, parts.detach())
    gradients = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad.zero_()

    found = torch.zeros(2)

    def one_pass(inputs):
        model.state.own = (inputs.own.unsqueeze(-1) == torch.arange(2)).float()
        losses = weighted_losses(model, inputs)
        losses.sum().backward()
        found.add_(losses.detach())

    longest = max(len(sample.ids) for sample in samples)
    run = SimpleNamespace(config=TrainingConfig(tokens_per_batch=size), longest=longest, pad_id=2, device=CPU)
    with without_masks(model, True):
        passes = Passes(run, core.Repeated(None, "a pass"), one_pass)
        passes.run(samples, [], lambda batch, places: adapter_inputs(batch, responses, 2, places))
    torch.testing.assert_close(found, expected)
    for p, gradient in zip(parameters, gradients, strict=True):
        assert (p.grad - gradient).norm() <= 1e-5 * gradient.norm()
