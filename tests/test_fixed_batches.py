"""Batches of few shapes: each sample in one of them; what fills them up changes neither losses nor gradients."""

from types import SimpleNamespace

import torch

from meteora import MeteoraModel
from meteora.batches import Sample, collate, encode
from meteora.config import TrainingConfig
from meteora.fixed_batches import fixed_batches, fixed_groups
from meteora.passes import Passes, adapter_inputs, gate_inputs, weighted_losses
from meteora.recording import without_masks
from meteora.training_loop import response_losses


def samples_of(lengths):
    return [Sample([3] * n, [False] * (n - 1) + [True], [n % 2] * n) for n in lengths]


def test_every_sample_is_in_one_group_that_holds_it():
    lengths = torch.randint(5, 500, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    samples = samples_of(lengths)
    groups = fixed_groups(samples, 2048, 500)
    placed = [sample for group, *_ in groups for sample in group]
    assert sorted(map(id, placed)) == sorted(map(id, samples))
    for group, rows, length in groups:
        assert 0 < len(group) <= rows and max(len(sample.ids) for sample in group) <= length
        assert length in (64, 96, 128, 192, 256, 384, 500) and rows in (2048 // length, 2048 // length // 2)
    assert all(len(group) == rows for group, rows, _ in groups[:-1])


def test_a_few_short_samples_ride_along_with_longer_ones():
    (group, rows, length), *others = fixed_groups(samples_of([20] * 2 + [90] * 19), 2016, 500)
    assert (len(group), rows, length) == (21, 21, 96) and not others


def test_few_samples_get_a_small_batch():
    assert [shape for _, *shape in fixed_groups(samples_of([20] * 5), 16384, 500)] == [[8, 64]]
    assert [shape for _, *shape in fixed_groups(samples_of([20] * 3 + [70]), 16384, 500)] == [[5, 96]]


def test_a_sample_that_is_longer_than_a_batch_has_one_of_its_own():
    groups = fixed_groups(samples_of([90, 80]), 64, 1000)
    assert [(len(group), rows, length) for group, rows, length in groups] == [(1, 1, 96), (1, 1, 96)]
    assert [length for *_, length in fixed_groups(samples_of([90]), 64, 91)] == [91]


def test_places_are_reserved_in_powers_of_two_and_what_fills_a_batch_does_not_count(core):
    samples = encode(core.rows(count=3), {"one": 0, "two": 1}, core.Tokenizer(), 100)
    predicted, tokens = sum(sample.response_tokens for sample in samples), sum(len(sample.ids) for sample in samples)
    for size, shape in ((256, (2, 64, 8)), (512, (8, 64, 32)), (1 << 14, (8, 64, 32))):
        (batch, places), *others = fixed_batches(samples, size, 100, 2)
        inputs = adapter_inputs(batch, {0: 9, 1: 9}, 2, places)
        assert inputs.shape == shape
        if not others:
            assert (inputs.shares > 0).sum() == predicted and inputs.own.sum() == len(samples)
            assert batch.attention_mask.sum() == tokens and (batch.labels >= 0).sum() == predicted
            gates = gate_inputs(batch, batch.attention_mask.float(), 0.5, places)
            assert gates.shape == shape and gates.shares.sum() == 0.5 * predicted
            assert not gates.without_effect().weights.any() and not gates.without_effect().shares.any()
    (batch, places), *_ = fixed_batches(samples_of([64] * 8), 512, 100, 2)
    assert places == 32, "a 16th of the tokens, if no more are needed"


def test_losses_and_gradients_are_those_of_plain_batches(core, tiny_llama, tmp_path):
    paths = {name: core.make_adapter(tmp_path / name, tiny_llama, r=3, seed=n) for n, name in enumerate(("one", "two"))}
    model = MeteoraModel.from_adapters(tiny_llama, paths)
    parameters = [p.requires_grad_(True) for layer in model.layers.values() for p in (layer.lora_A, layer.lora_B)]
    rows = core.rows(count=5) + [{"task": "two", "prompt": "long " * 20, "response": "ok"}]
    samples = encode(rows, {"one": 0, "two": 1}, core.Tokenizer(), 200)
    responses = {task: sum(s.response_tokens for s in samples if s.task == task) for task in (0, 1)}

    batch = collate(samples, 2, torch.device("cpu"))
    tasks = torch.tensor(batch.tasks)
    model.state.own = torch.nn.functional.one_hot(tasks, 2).float()
    parts = response_losses(model, batch) / torch.tensor([responses[task] for task in batch.tasks])
    parts.sum().backward()
    expected = torch.zeros(2).index_add(0, tasks, parts.detach())
    gradients = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad.zero_()

    found, shapes = torch.zeros(2), set()

    def one_pass(inputs):
        shapes.add(inputs.shape)
        model.state.own = inputs.own
        losses = weighted_losses(model, inputs)
        losses.sum().backward()
        found.add_(losses.detach())

    config = TrainingConfig(tokens_per_batch=400, max_length=200)
    run = SimpleNamespace(config=config, pad_id=2, device=torch.device("cpu"))
    with without_masks(model, True):
        passes = Passes(run, core.Repeated(None, "a pass"), one_pass)
        passes.run(samples, [], lambda batch, places: adapter_inputs(batch, responses, 2, places))
    assert len(shapes) > 1
    torch.testing.assert_close(found, expected)
    for p, gradient in zip(parameters, gradients, strict=True):
        assert (p.grad - gradient).norm() <= 1e-5 * gradient.norm()
