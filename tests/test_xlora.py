"""Method xlora: the outputs of PEFT's own X-LoRA model, with a KV cache that PEFT does without, and a training."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model

from data_prep.base_models import load_base_model
from data_prep.toy import toy_examples
from meteora import MeteoraModel, passes
from meteora.config import TrainingConfig
from meteora.study.baselines import share_weights
from meteora.study.decoding import TranscriptBatch
from meteora.study.evaluation import generate_answers
from meteora.study.graphs import can_be_fixed
from meteora.study.transcripts import gate_examples
from meteora.study.xlora import XLora, train_xlora, xlora_method

TASKS = ["toy_echo", "toy_first_letter", "toy_parity"]
CONFIG = TrainingConfig(max_steps=6, samples_per_step=2, learning_rate=0.1, seed=3)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(1)
    model, tokenizer = load_base_model("tiny")
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.4)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(base[0]), config).save_pretrained(folder / task)
    return {task: folder / task for task in TASKS}


@pytest.fixture
def xlora(base, adapters):
    return XLora(MeteoraModel.from_adapters(share_weights(base[0]), adapters), seed=4).eval()


@pytest.fixture(scope="module")
def dataset():
    return gate_examples({task: toy_examples(task)[:8] for task in TASKS}, 6)


def test_outputs_are_those_of_pefts_model(base, adapters, xlora):
    model = copy.deepcopy(base[0])
    model.config.use_cache = False
    numbered = {str(n): str(path) for n, path in enumerate(adapters.values())}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=numbered)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.base_model.internal_xlora_classifier.load_state_dict(xlora.classifier.state_dict())
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected, found = theirs(**inputs, use_cache=False).logits, xlora(**inputs, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, base[0](**inputs).logits, atol=1e-2)


def test_the_cache_changes_nothing(base, xlora):
    _, tokenizer = base
    prompts = [row["prompt"] for task in TASKS for row in toy_examples(task)[:2]]
    together = generate_answers(xlora, tokenizer, prompts, batch_size=4, max_new_tokens=6)
    assert len(set(together)) > 1
    for prompt, answer in zip(prompts, together, strict=True):
        ids, written = tokenizer(prompt)["input_ids"], []
        for _ in range(6):
            with torch.no_grad():
                scores = xlora(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1]
            if scores.argmax() == tokenizer.eos_token_id:
                break
            written.append(scores.argmax().item())
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == answer


def test_steps_over_caches_of_fixed_size_change_nothing(base, xlora):
    tokenizer = base[1]
    prompts = [tokenizer(text)["input_ids"] for text in ("hello there", " xyz", "a much longer prompt")]
    answers = []
    for fixed in (False, True):
        batch = TranscriptBatch(xlora, 3, pad_token_id=tokenizer.pad_token_id, eos_token_id=-1, fixed=fixed)
        batch.extend(prompts)
        first = batch.decode([9, 4, 9])
        batch.extend([[5, 6], [7], [8]])
        answers.append([first, batch.decode([6, 9, 9])])
        assert batch._steps is None and all(len(part.layers) for part in batch._cache.parts)
    assert answers[0] == answers[1]


def test_it_can_be_recorded_as_other_models_can(base, xlora):
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = xlora(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    assert can_be_fixed(xlora, cache)


def test_training_lowers_the_loss_and_touches_the_classifier_alone(base, xlora, dataset, tmp_path):
    _, tokenizer = base
    frozen = {name: t.clone() for name, t in xlora.model.state_dict().items()}
    start = copy.deepcopy(xlora.classifier.state_dict())
    history = train_xlora(xlora, dataset, CONFIG, tokenizer=tokenizer, output_dir=tmp_path / "xlora")
    assert [row["step"] for row in history] == list(range(1, 7))
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(torch.equal(frozen[name], t.cpu()) for name, t in xlora.model.state_dict().items())
    assert not any(torch.equal(start[name], t.cpu()) for name, t in xlora.classifier.state_dict().items())
    assert xlora.model.state.forced is None and xlora.model.state.backend == "auto"


def test_what_is_trained_is_kept_until_something_changes(base, adapters, dataset, tmp_path, monkeypatch):
    model, tokenizer = base
    wrapped = MeteoraModel.from_adapters(share_weights(model), adapters)
    options = {"tokenizer": tokenizer, "output_dir": tmp_path / "xlora"}
    first = xlora_method(wrapped, dataset, CONFIG, **options)
    with monkeypatch.context() as patch:
        patch.setattr("meteora.study.xlora.TrainingRun", None)
        again = xlora_method(wrapped, dataset, CONFIG, **options)
        with pytest.raises(TypeError):
            xlora_method(wrapped, dataset[:-1], CONFIG, **options)
    assert again.identity() == first.identity()
    assert set(first.identity()["weights"]) == {"base", "adapters", "classifier"}
    (tmp_path / "xlora" / "classifier.safetensors").unlink()
    assert xlora_method(wrapped, dataset, CONFIG, **options).identity() == first.identity(), "trained anew"
    other = xlora_method(wrapped, dataset[:-1], CONFIG, **options)
    assert other.identity() != first.identity()


def _history(base, adapters, dataset, folder, device="cpu"):
    model = share_weights(copy.deepcopy(base[0]).to(device))
    xlora = XLora(MeteoraModel.from_adapters(model, adapters), seed=4).eval()
    history = train_xlora(xlora, dataset, CONFIG, tokenizer=base[1], output_dir=folder)
    return [row["loss"] for row in history]


def test_passes_that_could_be_recorded_train_the_same(core, base, adapters, dataset, tmp_path, monkeypatch):
    expected = _history(base, adapters, dataset, tmp_path / "plain")
    made = core.repeat_recordings(monkeypatch, passes)
    assert _history(base, adapters, dataset, tmp_path / "fixed") == pytest.approx(expected, rel=1e-4)
    assert made[0].keys


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_recorded_passes_train_the_same_on_a_gpu(core, base, adapters, dataset, tmp_path, monkeypatch, caplog):
    made = core.watch_recordings(monkeypatch)
    recorded = _history(base, adapters, dataset, tmp_path / "recorded", "cuda")
    assert len(made) == 1 and made[0]
    assert not [line for line in caplog.records if line.name == "meteora.recording"]
    monkeypatch.setattr(passes, "can_be_recorded", lambda model, device: False)
    assert _history(base, adapters, dataset, tmp_path / "plain", "cuda") == pytest.approx(recorded, rel=1e-3)
