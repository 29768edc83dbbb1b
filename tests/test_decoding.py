"""Greedy decoding in one growing cache: against `generate`, against one row at a time, and against no cache at all.

Everything is tested with steps over a growing and over a fixed cache; on a GPU, the latter are CUDA graphs.
"""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from data_prep.base_models import load_base_model
from meteora import MeteoraModel
from meteora.study import decoding, graphs
from meteora.study.decoding import EncodedPrefix, TranscriptBatch, common_prefix_length
from meteora.study.xlora import TwoCaches

PROMPTS = ["hello there", " xyz", "hel", "a much longer prompt than all of the others"]
NEW = 14


@pytest.fixture(scope="module")
def tiny():
    """A tiny model in float64, so that equality is exact, with lively weights and frequent ends of text."""
    model, tokenizer = load_base_model("tiny")
    torch.manual_seed(1)
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.4)
    return model.double().eval(), tokenizer


@pytest.fixture(scope="module")
def encoded(tiny):
    return [tiny[1](prompt)["input_ids"] for prompt in PROMPTS]


def uncached(model, tokens, limit, eos):
    """Greedy decoding that encodes everything anew for every token."""
    answer = []
    while len(answer) < limit:
        with torch.no_grad():
            token = model(torch.tensor([tokens + answer])).logits[0, -1].argmax().item()
        if token == eos:
            break
        answer.append(token)
    return answer


def eos_in_the_middle(model, encoded):
    """A token that some rows write early and others do not: stands in for end-of-text."""
    answers = [uncached(model, tokens, NEW, None) for tokens in encoded]
    for token in answers[0][2:]:
        lengths = {row.index(token) if token in row else NEW for row in answers}
        if len(lengths) > 1:
            return token
    raise AssertionError("choose another seed: no token tells the rows apart")


@pytest.fixture(params=[False, True], ids=["growing", "fixed"])
def start(request):
    """A batch of `encoded` transcripts, whose steps run over a cache that grows, or over one of fixed size."""

    def start(tiny, encoded, eos, prefix=None, fixed=request.param):
        pad = tiny[1].pad_token_id
        batch = TranscriptBatch(tiny[0], len(encoded), pad_token_id=pad, eos_token_id=eos, prefix=prefix, fixed=fixed)
        batch.extend(encoded)
        return batch

    return start


@pytest.fixture(params=["ample", "scarce"])
def room(request, monkeypatch):
    """Fixed caches that hold a whole answer; or that are full after a few steps, and that rows leave in time."""
    if request.param == "scarce":
        monkeypatch.setattr(graphs, "ROOM", 5)
        monkeypatch.setattr(graphs, "ROUND", 1)
        monkeypatch.setattr(decoding, "LEAST_STEPS_AGAIN", 0)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.usefixtures("room")
def test_a_padded_batch_equals_generate_and_uncached_decoding(tiny, encoded, start, last):
    model, tokenizer = tiny
    eos = eos_in_the_middle(model, encoded)
    answers = start(tiny, encoded, eos).decode([NEW] * len(encoded), last=last)
    assert len({len(answer) for answer in answers}) > 1
    assert answers == [uncached(model, tokens, NEW, eos) for tokens in encoded]
    for tokens, answer in zip(encoded, answers):
        ids = torch.tensor([tokens])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        written = generated[0, len(tokens) :].tolist()
        assert answer == (written[:-1] if written[-1] == eos else written)


@pytest.mark.usefixtures("room")
def test_growing_transcripts_equal_encoding_the_whole_transcript(tiny, encoded, start):
    model, _ = tiny
    eos = eos_in_the_middle(model, encoded)
    limits = [NEW, 3, NEW, 5]
    batch = start(tiny, encoded, eos)
    transcripts = [list(tokens) for tokens in encoded]
    for segments in (None, [[eos, 5], [eos, 6, 7, 8], [eos], [eos, 9]], [[eos, 11, 12], [eos], [eos, 7], [eos, 13]]):
        if segments:
            batch.extend(segments)
            transcripts = [row + segment for row, segment in zip(transcripts, segments)]
        answers = batch.decode(limits)
        assert answers == [uncached(model, row, limit, eos) for row, limit in zip(transcripts, limits)]
        transcripts = [row + answer for row, answer in zip(transcripts, answers)]


def test_an_encoded_prefix_changes_nothing_and_is_not_used_up(tiny, encoded, start):
    model, _ = tiny
    shared = [[3, 4, 5, 6, 7, 8] + tokens for tokens in encoded]
    length = common_prefix_length(shared)
    assert length >= 6
    prefix = EncodedPrefix(model, shared[0][:length])
    expected = start(tiny, shared, -1, fixed=False).decode([NEW] * 4, last=True)
    for _ in range(2):
        rest = [tokens[length:] for tokens in shared]
        assert start(tiny, rest, -1, prefix).decode([NEW] * 4, last=True) == expected


def test_a_processor_sees_what_was_generated_by_the_call_so_far(tiny, encoded, start):
    """It forces every fourth token, and bans the token that was written before."""
    model, _ = tiny
    calls = []

    def processor(generated, scores):
        calls.append(generated.shape)
        scores = scores.clone()
        if generated.shape[1]:
            scores.scatter_(1, generated[:, -1:], -torch.inf)
        if generated.shape[1] % 4 == 3:
            scores[:, 9] = torch.inf
        return scores

    limits = [NEW, 3, NEW, 6]
    answers = start(tiny, encoded, -1).decode(limits, processor=processor, last=True)
    for tokens, answer, limit in zip(encoded, answers, limits):
        assert len(answer) == limit and answer[3::4] == [9] * (limit // 4 + (limit % 4 > 3))
        alone = start(tiny, [tokens], -1, fixed=False)
        assert [answer] == alone.decode([limit], processor=processor, last=True)
    assert [shape[1] for shape in calls[:NEW]] == list(range(NEW))


def test_fixed_steps_hold_the_cache_only_while_an_answer_is_written(tiny, encoded):
    batch = TranscriptBatch(tiny[0], 4, pad_token_id=0, eos_token_id=-1, fixed=True)
    batch.extend(encoded)
    layer, written = batch._cache.layers[0], max(map(len, encoded))
    capacities, scores = [], []

    def processor(generated, given):
        capacities.append(batch._cache.layers[0].keys.shape[2])
        scores.append(batch._steps is not None)
        return given

    batch.decode([NEW, 1, 2, NEW], processor=processor)
    assert scores == [False] + [True] * (NEW - 1) and len(set(capacities[1:])) == 1
    assert batch._steps is None and batch._cache.layers[0] is layer
    assert layer.keys.shape[2] == batch._mask.shape[1] == written + NEW - 1
    assert batch._mask.sum(1).tolist() == [len(row) + n - 1 for row, n in zip(encoded, [NEW, 1, 2, NEW])]


def test_what_cannot_be_fixed_stays_as_it_is(tiny, encoded):
    model, _ = tiny
    caches = [DynamicCache(config=model.config), TwoCaches(None, None), DynamicCache(config=model.config)]
    caches[2].layers[0] = type("Other", (graphs.DynamicLayer,), {})()
    assert [graphs.can_be_fixed(model, cache) for cache in caches] == [True, False, False]
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["v_proj"]))
    assert not graphs.can_be_fixed(wrapped, caches[0])
    steps = []
    batch = TranscriptBatch(wrapped.eval(), 4, pad_token_id=0, eos_token_id=-1, fixed=True)
    batch.extend(encoded)
    answers = batch.decode([NEW] * 4, processor=lambda generated, scores: steps.append(batch._steps) or scores)
    assert set(steps) == {None}
    assert answers == [uncached(model, tokens, NEW, -1) for tokens in encoded]


def test_common_prefix_leaves_every_prompt_a_token():
    assert common_prefix_length([[1, 2, 3], [1, 2, 4], [1, 2, 3, 9]]) == 2
    assert common_prefix_length([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix_length([[2, 1], [1, 2]]) == 0
    assert common_prefix_length([[1, 2, 3]]) == 0
    assert common_prefix_length([]) == 0


def test_limits_of_zero_and_misuse(tiny, encoded, start):
    batch = start(tiny, encoded, -1)
    assert [len(answer) for answer in batch.decode([0, 2, 0, 1])] == [0, 2, 0, 1]
    with pytest.raises(RuntimeError, match="extend"):
        batch.decode([1] * 4)
    with pytest.raises(ValueError, match="at least one token"):
        TranscriptBatch(tiny[0], 1, pad_token_id=0, eos_token_id=1).extend([[]])


@pytest.mark.parametrize("waits, expected", [([], "rpp"), ([0], "wrrp"), ([0, 1], "wrwrr")])
def test_a_step_is_recorded_once_it_was_run_without_waiting(tiny, monkeypatch, caplog, waits, expected):
    """Of three calls: r is a run, w one that is broken off because it waits, p a recording's replay."""
    model, done, tried = copy.copy(tiny[0]), [], iter(range(9))
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def waits_for_gpu(call):
        if next(tried) in waits:
            done.append("w")
            return True
        call()
        return False

    def record(step, pool):
        return SimpleNamespace(replay=lambda: done.append("p")), "a result"

    monkeypatch.setattr(graphs, "waits_for_gpu", waits_for_gpu)
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "_recorder", lambda device: (stream, "pool", None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    graph = graphs.StepGraph(model, torch.device("cuda"))
    results = [graph.run(lambda: done.append("r") or "a step") for _ in range(3)]
    assert "".join(done) == expected
    assert results[-1] == ("a step" if waits == [0, 1] else "a result")
    assert (model in graphs._refused) == (waits == [0, 1]) == ("cannot be a CUDA graph" in caplog.text)


@pytest.fixture(scope="module")
def on_gpu(tiny, tmp_path_factory):
    """The tiny model in float32 on a GPU: as it is, and as the base of a MeteoRA model with three adapters."""
    base, folder = copy.deepcopy(tiny[0]).float(), tmp_path_factory.mktemp("adapters")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    for name in "abc":
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / name)
    mixture = MeteoraModel.from_adapters(copy.deepcopy(base), {name: folder / name for name in "abc"})
    for layer in mixture.layers.values():
        torch.nn.init.normal_(layer.gate.weight)
    mixture.set_top_k(2)
    return {"base": copy.deepcopy(base).cuda().eval(), "mixture": mixture.cuda().eval()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
class TestOnGPU:
    @pytest.fixture
    def recorded(self, warm, monkeypatch):
        """How often a step was recorded."""
        calls, record = [], graphs.record
        monkeypatch.setattr(graphs, "record", lambda *args: calls.append(args) or record(*args))
        return calls

    @pytest.fixture
    def said(self, caplog):
        return lambda: [record.message for record in caplog.records if record.name == graphs.logger.name]

    @pytest.fixture(autouse=True)
    def warm(self):
        graphs._recorder(torch.device("cuda", torch.cuda.current_device()))  # records a small graph of its own

    @staticmethod
    def answers(model, encoded, eos, fixed, last):
        """Two answers a row, or one, the last."""
        batch = TranscriptBatch(model, len(encoded), pad_token_id=0, eos_token_id=eos, fixed=fixed)
        batch.extend(encoded)
        answers = batch.decode([NEW, 40, NEW, 5], last=last)
        if last:
            return answers
        batch.extend([[3, 5], [3, 6, 7, 8], [3], [3, 9]])
        return answers + batch.decode([NEW, 3, 40, 5])

    # Not every pair: rows that have an adapter each cannot leave the batch.
    @pytest.mark.parametrize(
        "state, last", [("base", True), ("gates", True), ("gates", False), ("b", True), ("acba", False)]
    )
    @pytest.mark.usefixtures("room")
    def test_replayed_steps_answer_as_others_do(self, on_gpu, tiny, encoded, recorded, state, last):
        """Of the base model, of the mixture as its gates choose, with one adapter, and with one for every row."""
        model, eos = on_gpu["base" if state == "base" else "mixture"], tiny[1].eos_token_id
        routed = nullcontext() if state in ("base", "gates") else model.route_to(state if last else list(state))
        with routed:
            expected = self.answers(model, encoded, eos, False, last)
            for _ in range(2):  # the second time in the memory of the first
                assert self.answers(model, encoded, eos, True, last) == expected
        assert max(map(len, expected)) > 5 and recorded and model not in graphs._refused

    def test_a_state_that_changes_between_answers_is_seen(self, on_gpu, encoded, recorded):
        model, transcripts = on_gpu["mixture"], {}
        for fixed in (False, True):
            batch = TranscriptBatch(model, 4, pad_token_id=0, eos_token_id=-1, fixed=fixed)
            transcripts[fixed] = []
            for names in (["a", "b", "c", "a"], ["c", "c", "a", "b"], ["b", "a", "a", "c"]):
                with model.route_to(names):
                    batch.extend(encoded)
                    transcripts[fixed].append(batch.decode([NEW] * 4))
        assert transcripts[True] == transcripts[False]
        assert len(recorded) == 3

    def test_a_step_that_waits_is_left_as_it_is(self, on_gpu, encoded, recorded, said):
        model = on_gpu["mixture"]
        waiting = copy.deepcopy(model)
        waiting.set_backend("loop")
        expected = self.answers(waiting, encoded, -1, False, False)
        for _ in range(2):
            assert self.answers(waiting, encoded, -1, True, False) == expected
        assert not recorded
        assert said() == ["a decoding step of MeteoraModel cannot be a CUDA graph: it waits for the GPU."]
        assert self.answers(model, encoded, -1, True, False) and recorded, "other models are recorded all the same"

    def test_a_recording_that_fails_changes_no_answer(self, on_gpu, encoded, monkeypatch, said):
        model = copy.deepcopy(on_gpu["base"])
        expected = self.answers(model, encoded, -1, False, False)

        def failing(step, pool):
            raise RuntimeError("operation not permitted")

        monkeypatch.setattr(graphs, "record", failing)
        assert self.answers(model, encoded, -1, True, False) == expected
        assert model in graphs._refused and len(said()) == 1
