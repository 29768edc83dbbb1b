"""Composites: every protocol against a plain re-encoding of what the model saw, batched against one at a time."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from data_prep.base_models import load_base_model
from data_prep.composite import CompositeItem, parse_answers
from data_prep.errors import DataError
from data_prep.prepare import prepare_tasks
from data_prep.toy import toy_examples
from meteora import MeteoraModel
from meteora.batches import encode
from meteora.study.artifacts import Workspace
from meteora.study.baselines import build_methods
from meteora.study.composite import (
    composite_rows, composite_runs, paired_composite_rows, predict_composite, score_composite,
)  # fmt: skip
from meteora.study.decoding import TranscriptBatch
from meteora.study.guided import GuidedNumbering
from meteora.study.profiles import load_profile
from meteora.study.sequential import answer_in_sequence, transcript

TASKS = ("toy_echo", "toy_first_letter", "toy_parity")
LIMITS = {"toy_echo": 7, "toy_first_letter": 3, "toy_parity": 5}
PREFIX = "Example 1: a b c\n1. x\n2. y\n3. z\n\nFollowing the example above, generate answers to the questions below:\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny MeteoRA model in float64, so that equality is exact, with lively weights, adapters and gates."""
    base, tokenizer = load_base_model("tiny")
    torch.manual_seed(3)
    for weights in base.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.4)
    # larger scores, of either sign: some answers end by themselves
    base.lm_head.weight.data[tokenizer.eos_token_id] *= 1.8
    base = base.double().eval()
    folder = tmp_path_factory.mktemp("adapters")
    for task in TASKS:
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / task)
    model = MeteoraModel.from_adapters(base, {task: folder / task for task in TASKS})
    for layer in model.layers.values():
        torch.nn.init.normal_(layer.gate.weight)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def items():
    """Five items whose sub-tasks come in different orders and lengths."""
    made = []
    for i in range(5):
        order = TASKS[i % 3 :] + TASKS[: i % 3]
        examples = [toy_examples(task)[i] for task in order]
        if i == 2:
            examples[1] = examples[1] | {"prompt": examples[1]["prompt"] * 3}
        body = "\n\n".join(example["prompt"] for example in examples) + "\n"
        made.append(CompositeItem(id=str(i), tasks=list(order), prefix=PREFIX, body=body, examples=examples))
    return made


@pytest.fixture
def methods(tiny):
    return build_methods(["base", "meteora_top2"], tiny[0])


def predict(methods, items, protocol, tiny, folder, **changes):
    settings = {"limits": LIMITS, "batch_size": 2, "progress": False} | changes
    return predict_composite(methods, items, protocol, tokenizer=tiny[1], predictions_dir=folder, **settings)


def greedy(model, tokens, limit, eos, processor=None):
    """Greedy decoding of one row that encodes everything anew for every token."""
    answer = []
    while len(answer) < limit:
        with torch.no_grad():
            scores = model(torch.tensor([tokens + answer])).logits[:, -1]
        if processor:
            scores = processor(torch.tensor([answer], dtype=torch.long), scores)
        token = scores.argmax().item()
        if token == eos:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("method", ["meteora_top2", "peft", "base"])
def test_sequential_equals_encoding_the_transcript_anew(tiny, items, method, batch_size):
    model, tokenizer = tiny
    run = build_methods([method], model)[method]
    answers = {}
    examples = [item.examples for item in items]
    for batch in answer_in_sequence(
        model, tokenizer, examples, limits=LIMITS, batch_size=batch_size, active=run.active
    ):
        answers |= batch
    ended_early = 0
    for i, item in enumerate(items):
        for position, example in enumerate(item.examples):
            prompts = [e["prompt"] for e in item.examples[: position + 1]]
            # the oracle's earlier problems were run with *their* adapters, so its transcript cannot be run in one pass
            if method == "peft" and position:
                continue
            tokens = transcript(tokenizer, prompts, [*answers[i][:position], []]).tokens
            with run.active(example["task"]):
                expected = greedy(model, tokens, LIMITS[example["task"]], tokenizer.eos_token_id)
            assert answers[i][position] == expected
            ended_early += len(expected) < LIMITS[example["task"]]
    assert ended_early  # both ways to end an answer occur


@pytest.mark.parametrize("method", ["meteora_top2", "peft"])
def test_sequential_batched_equals_one_at_a_time(tiny, items, method):
    model, tokenizer = tiny
    run = build_methods([method], model)[method]

    def answers(batch_size):
        out = {}
        for batch in answer_in_sequence(
            model, tokenizer, [i.examples for i in items], limits=LIMITS, batch_size=batch_size, active=run.active
        ):
            out |= batch
        return out

    assert answers(1) == answers(2) == answers(5)


def test_transcript_closes_every_answer_but_the_last(tiny):
    _, tokenizer = tiny
    prompts = ["[INST] a [/INST]\n", "[INST] b [/INST]\n", "[INST] c [/INST]\n"]
    found = transcript(tokenizer, prompts, [[65, 66], [], [67]])
    eos, first, last = tokenizer.eos_token, tokenizer.decode([65, 66]), tokenizer.decode([67])
    assert tokenizer.decode(found.tokens, skip_special_tokens=False) == (
        f"{prompts[0]}{first}{eos}\n{prompts[1]}{eos}\n{prompts[2]}{last}"
    )
    parts = list(zip(found.tokens, found.problem, found.is_answer, strict=True))
    assert [(t, i) for t, i, answer in parts if answer] == [
        (65, 0), (66, 0), (tokenizer.eos_token_id, 0), (tokenizer.eos_token_id, 1), (67, 2),
    ]  # fmt: skip
    assert [i for _, i, _ in parts] == sorted(i for _, i, _ in parts)


def test_transcripts_are_what_the_gates_are_trained_on(tiny, items):
    _, tokenizer = tiny
    examples = items[0].examples
    (trained,) = encode([{"turns": examples}], {task: n for n, task in enumerate(TASKS)}, tokenizer, 10_000)
    responses = [tokenizer.encode(example["response"], add_special_tokens=False) for example in examples]
    seen = transcript(tokenizer, [example["prompt"] for example in examples], responses)
    assert [*seen.tokens, tokenizer.eos_token_id] == trained.ids
    assert [TASKS.index(examples[i]["task"]) for i in seen.problem] == trained.tasks[:-1]


def test_the_oracle_runs_every_token_of_a_problem_as_its_task(tiny, items, monkeypatch):
    """Problem, answer and the answer's end: what is fed while the model is routed to a task is that task's alone."""
    model, tokenizer = tiny
    fed, forward = [[] for _ in items], MeteoraModel.forward

    def record(self, **inputs):
        new = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :]
        for row, (ids, real) in enumerate(zip(inputs["input_ids"].tolist(), new.tolist(), strict=True)):
            task = self.state.forced.indices[row].item()
            fed[row] += [(token, TASKS[task]) for token, keep in zip(ids, real, strict=True) if keep]
        return forward(self, **inputs)

    monkeypatch.setattr(MeteoraModel, "forward", record)
    run = build_methods(["peft"], model)["peft"]
    examples = sorted((item.examples for item in items), key=lambda e: -sum(len(x["prompt"]) for x in e))
    (answers,) = answer_in_sequence(
        model, tokenizer, examples, limits=LIMITS, batch_size=len(items), active=run.active
    )
    for row, problems in enumerate(examples):
        whole = transcript(tokenizer, [example["prompt"] for example in problems], answers[row])
        expected = [(token, problems[i]["task"]) for token, i in zip(whole.tokens, whole.problem, strict=True)]
        assert fed[row] == expected[: len(fed[row])] and len(expected) - len(fed[row]) <= 1  # the last token is not fed


@pytest.mark.parametrize("protocol", ["numbered", "guided"])
def test_prompt_protocols_equal_encoding_everything_anew(tiny, items, methods, tmp_path, protocol):
    model, tokenizer = tiny
    predictions = predict(methods, items, protocol, tiny, tmp_path, temperatures=[1.0])
    guide = GuidedNumbering(tokenizer, [LIMITS[example["task"]] for example in items[0].examples])
    for name, method in methods.items():
        for item, found in zip(items, predictions[name][1.0], strict=True):
            with method.active():
                tokens = tokenizer(item.prompt)["input_ids"]
                processor = guide if protocol == "guided" else None
                written = greedy(model, tokens, guide.max_new_tokens, tokenizer.eos_token_id, processor)
            text = guide.text(written) if protocol == "guided" else tokenizer.decode(written, skip_special_tokens=True)
            assert found == parse_answers(text.strip(), 3)
            if protocol == "guided":
                assert [line[:3] for line in text.split("\n")] == ["1. ", "2. ", "3. "]


def test_temperature_matters_to_gates_only_and_both_are_kept(tiny, items, methods, tmp_path):
    predictions = predict(methods, items, "sequential", tiny, tmp_path, temperatures=[15.0, 1.0])
    assert predictions["base"][15.0] is predictions["base"][1.0]
    assert predictions["meteora_top2"][15.0] != predictions["meteora_top2"][1.0]
    files = sorted(path.name for path in (tmp_path / "composite-3" / "sequential").iterdir())
    assert files == ["base.jsonl", "meteora_top2%401.jsonl", "meteora_top2%4015.jsonl"]
    alone = predict(methods, items, "sequential", tiny, tmp_path / "alone", temperatures=[1.0])
    assert alone["meteora_top2"][1.0] == predictions["meteora_top2"][1.0]


@pytest.mark.parametrize("protocol", ["numbered", "guided", "sequential"])
def test_answers_are_kept_and_an_interrupted_run_resumes(tiny, items, methods, tmp_path, monkeypatch, protocol):
    whole = predict(methods, items, protocol, tiny, tmp_path / "whole")
    decode, calls = TranscriptBatch.decode, []

    def interrupted(self, limits, **options):
        calls.append(limits)
        if len(calls) > (5 if protocol == "sequential" else 2):
            raise KeyboardInterrupt
        return decode(self, limits, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TranscriptBatch, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict(methods, items, protocol, tiny, tmp_path / "resumed")
    assert len(list((tmp_path / "resumed").rglob("*.jsonl"))) == 1  # of one method, the first batch or two
    assert predict(methods, items, protocol, tiny, tmp_path / "resumed") == whole

    calls.clear()
    monkeypatch.setattr(TranscriptBatch, "decode", interrupted)
    assert predict(methods, items, protocol, tiny, tmp_path / "whole") == whole
    assert not calls
    example = items[0].examples[0] | {"prompt": "?"}
    changed = dataclasses.replace(items[0], body="?", examples=[example, *items[0].examples[1:]])
    with pytest.raises(KeyboardInterrupt):
        predict(methods, [changed, *items[1:]], protocol, tiny, tmp_path / "whole")


def test_misuse_is_refused(tiny, items, tmp_path):
    methods = build_methods(["peft"], tiny[0])
    with pytest.raises(ValueError, match="'peft' has to be told"):
        predict(methods, items, "guided", tiny, tmp_path)
    with pytest.raises(ValueError, match="'both'.*numbered, guided, sequential"):
        predict(methods, items, "both", tiny, tmp_path)


def right(item):
    return [example["response"] for example in item.examples]


def test_composites_of_tasks_that_could_not_be_had_are_left_out(tmp_path, caplog):
    smoke = load_profile("smoke")
    profile = dataclasses.replace(smoke, tasks=(*smoke.tasks, "gsm8k"), root=str(tmp_path))
    workspace = Workspace(profile)
    sizes = profile.data
    prepare_tasks(smoke.tasks, workspace.data, sizes={"train": sizes.train, "valid": sizes.valid, "test": sizes.test})
    every = {run.size for run in composite_runs(workspace)}

    def with_sizes(sizes):
        composite = dataclasses.replace(profile.composite, sizes=sizes, temperature={})
        return Workspace(dataclasses.replace(profile, composite=composite))

    four = (*smoke.tasks, "gsm8k")
    assert {run.size for run in composite_runs(with_sizes({**profile.composite.sizes, 4: four}))} == every
    assert "composites of 4 are left out, as gsm8k could not be prepared" in caplog.text
    with pytest.raises(DataError, match="every composite of the profile has a task that could not be prepared"):
        composite_runs(with_sizes({4: four}))


def test_rows_count_attempted_and_correct(items):
    good = [right(item) for item in items]
    half = [[answers[0], None, "nothing of the kind"] for answers in good]
    assert score_composite(items, good) == {"attempted": [3.0] * 5, "correct": [3.0] * 5}
    assert score_composite(items, half) == {"attempted": [2.0] * 5, "correct": [1.0] * 5}
    predictions = {"peft": {1.0: good, 15.0: good}, "base": {1.0: half, 15.0: half}}
    rows = composite_rows(items, "sequential", predictions, shots=2)
    columns = "composite,protocol,shots,temperature,subtask,method,metric,value,low,high,n"
    assert {",".join(row) for row in rows} == {columns}
    assert {(row["composite"], row["protocol"], row["shots"]) for row in rows} == {(3, "sequential", 0)}
    assert {row["shots"] for row in composite_rows(items, "guided", predictions, shots=2)} == {2}
    total = {(r["method"], r["metric"], r["temperature"]): r["value"] for r in rows if r["subtask"] == "ALL"}
    assert total["base", "attempted", 15.0] == 2.0 and total["base", "correct", 1.0] == 1.0
    assert total["peft", "correct", 1.0] == 3.0 and len(total) == 8
    # `correct` is the sum of the sub-tasks' accuracies when every item has every sub-task
    for method, correct in (("base", 1.0), ("peft", 3.0)):
        accuracies = [r for r in rows if (r["method"], r["metric"], r["temperature"]) == (method, "accuracy", 1.0)]
        assert [r["subtask"] for r in accuracies] == list(TASKS)
        assert sum(r["value"] for r in accuracies) == pytest.approx(correct)
        assert {r["n"] for r in accuracies} == {5}


def test_paired_differences(items):
    good = [right(item) for item in items]
    half = [[answers[0], None, "nothing of the kind"] for answers in good]
    (attempted, correct) = paired_composite_rows(
        items, {"a": {1.0: good}, "b": {1.0: half}}, [("a", "b")], temperature=1.0
    )
    assert (attempted["metric"], attempted["value"], attempted["low"]) == ("attempted", 1.0, 1.0)
    assert (correct["metric"], correct["value"], correct["high"]) == ("correct", 2.0, 2.0)
