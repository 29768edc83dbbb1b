"""Passes as CUDA graphs: which models qualify, and when a step is recorded."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from meteora import recording
from meteora.recording import Recordings, can_be_recorded

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_models_with_one_device_and_causal_attention_qualify(tiny_llama):
    assert can_be_recorded(tiny_llama, GPU) and not can_be_recorded(tiny_llama, CPU)
    eager = copy.deepcopy(tiny_llama)
    eager.config._attn_implementation = "eager"
    assert not can_be_recorded(eager, GPU)
    spread = copy.deepcopy(tiny_llama)
    spread.model.norm.to("meta")
    assert not can_be_recorded(spread, GPU)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for window in (None, 8):
        sliding = MistralForCausalLM(MistralConfig(**size, **heads, sliding_window=window))
        assert can_be_recorded(sliding, GPU) == (window is None)


class FakeGPU:
    """Streams that do nothing; a recording of a step is the step."""

    def __init__(self, monkeypatch):
        self.recorded, self.emptied, self.free = [], [], 2
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(recording, "_side_stream", lambda device: stream)
        monkeypatch.setattr(recording, "record", self.record)
        for name, value in {
            "graph_pool_handle": lambda: "pool", "current_stream": lambda device: stream,
            "stream": lambda stream: torch.enable_grad(),
            "empty_cache": lambda: self.emptied.append(len(self.recorded)),
            "memory_reserved": lambda device: 7, "memory_allocated": lambda device: 5,
            "mem_get_info": lambda device: (self.free, 9),
            "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def record(self, step, pool):
        self.recorded.append(step)
        return SimpleNamespace(replay=step), None


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPU(monkeypatch)


def test_a_step_is_recorded_the_second_time_and_its_effect_is_there_once_each_time(gpu):
    recordings, done = Recordings(GPU, "a test"), []
    for n, key in enumerate("aabaabbb"):
        recordings.run(key, lambda key=key: done.append(key), rehearsal=lambda: done.append("rehearsal"))
        assert len(gpu.recorded) == [0, 1, 1, 1, 1, 2, 2, 2][n]
    assert "".join(done) == "a" + "rehearsal" + "abaabbb"


def test_memory_is_given_back_before_a_recording_that_may_lack_it(gpu):
    recordings = Recordings(GPU, "a test")
    for gpu.free in (2, 1):
        for _ in range(3):
            recordings.run(gpu.free, lambda: None, rehearsal=lambda: None)
    assert gpu.emptied == [1] and len(gpu.recorded) == 2


@pytest.mark.parametrize("fails", ["rehearsal", "record"])
def test_what_cannot_be_recorded_goes_on_and_is_told_once(gpu, monkeypatch, caplog, fails):
    def failing(*_):
        raise RuntimeError("called a synchronizing CUDA operation\nat some place")

    recordings, done = Recordings(GPU, "a test"), []
    if fails == "record":
        monkeypatch.setattr(recording, "record", failing)
    for key in "aaabb":
        rehearsal = failing if fails == "rehearsal" else lambda: None
        recordings.run(key, lambda key=key: done.append(key), rehearsal=rehearsal)
    assert done == list("aaabb") and not gpu.recorded
    said = [line.message for line in caplog.records]
    assert said == ["a test cannot be a CUDA graph: called a synchronizing CUDA operation."]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
class TestOnGPU:
    def test_replays_read_new_inputs_and_add_to_the_same_results(self, caplog):
        weight = torch.nn.Parameter(torch.ones(4, device=GPU))
        weight.grad, inputs, total = torch.zeros_like(weight), torch.zeros(4, device=GPU), torch.zeros((), device=GPU)
        recordings = Recordings(GPU, "a test")

        def step(x=inputs):
            loss = (weight * x).sum()
            loss.backward()
            total.add_(loss.detach())

        for n in range(1, 6):
            inputs.fill_(n)
            recordings.run("key", step, rehearsal=lambda: step(torch.zeros_like(inputs)))
        assert total.item() == 4 * 15 and weight.grad.tolist() == [15] * 4 and not caplog.records
        assert isinstance(recordings._graphs["key"], torch.cuda.CUDAGraph)

    def test_a_step_that_waits_is_left_as_it_is(self, caplog):
        inputs, seen = torch.ones(3, device=GPU), []
        recordings = Recordings(GPU, "a test")
        for _ in range(4):
            recordings.run("key", lambda: seen.append(inputs.sum().item()), rehearsal=lambda: inputs.sum().item())
        assert seen == [3.0] * 4 and len(caplog.records) == 1

    def test_a_recording_that_fails_leaves_a_gpu_that_works(self, caplog):
        inputs, fail = torch.ones(3, device=GPU), []
        total = torch.zeros((), device=GPU)

        def step():
            total.add_(inputs.sum())
            if torch.cuda.is_current_stream_capturing():
                fail.append(True)
                raise RuntimeError("not now")

        recordings = Recordings(GPU, "a test")
        for _ in range(4):
            recordings.run("key", step, rehearsal=lambda: None)
        assert total.item() == 12 and len(fail) == 1 and len(caplog.records) == 1
