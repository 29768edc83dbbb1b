"""What others build on a model: transformers' pipeline, and the example programs, run as a user runs them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, pipeline

from meteora import MeteoraModel

EXAMPLES = Path(__file__).parents[1] / "examples"
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ 0123?!.,'"
SETTINGS = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character, 64 in all."""
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS][:64])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="!"))
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "!"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}?{% endfor %}"
    return tokenizer


@pytest.fixture
def model(core, tiny_llama, mixed_adapters):
    tiny_llama.generation_config.eos_token_id = None
    return core.randomize_gates(MeteoraModel.from_adapters(tiny_llama, mixed_adapters))


def generated(model, tokenizer, prompt):
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, **SETTINGS)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_the_pipeline_generates_what_the_model_does(model, tokenizer):
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["hello there", "abc"]
    for found in (generate(prompts, **SETTINGS), generate(prompts, batch_size=2, **SETTINGS)):
        assert [row[0]["generated_text"] for row in found] == [p + generated(model, tokenizer, p) for p in prompts]
    with model.route_to(["one", "three"]):
        found = generate(prompts, batch_size=2, **SETTINGS)
    for row, name, prompt in zip(found, ("one", "three"), prompts, strict=True):
        with model.route_to(name):
            assert row[0]["generated_text"] == prompt + generated(model, tokenizer, prompt)
    chat = generate([{"role": "user", "content": "hi"}], **SETTINGS)[0]["generated_text"]
    assert chat[-1]["role"] == "assistant" and chat[-1]["content"] == generated(model, tokenizer, "hi?")


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    """Directories of a checkpoint and of its base model, as the programs take them."""
    model.state.untrained.clear()
    model.save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "base")
    model.unload().save_pretrained(tmp_path / "base")
    return MeteoraModel.from_pretrained(model.base_model, tmp_path / "mixture"), tmp_path


def program(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return {"args": [sys.executable, str(EXAMPLES / name), *map(str, arguments)], "env": environment, "text": True}


def test_the_training_program(core, saved, mixed_adapters):
    model, folder = saved
    (folder / "adapters").mkdir()
    for name in ("one", "three"):
        (folder / "adapters" / name).symlink_to(mixed_adapters[name])
    rows = [{**row, "task": {"one": "one", "two": "three"}[row["task"]]} for row in core.rows()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--base", folder / "base", "--adapters", folder / "adapters", "--data", folder / "rows.jsonl"]
    arguments += ["--output", folder / "out", "--set", "max_steps=3", "learning_rate=0.01"]
    done = subprocess.run(**program("train_gates.py", *arguments), capture_output=True, timeout=300)
    assert done.returncode == 0 and "gate loss 0.69" in done.stderr, done.stderr[-3000:]
    trained = MeteoraModel.from_pretrained(model.unload(), folder / "out")
    assert trained.adapter_names == ["one", "three"] and trained.state.warning is None
    assert any(layer.gate.weight.any() for layer in trained.layers.values())
    done = subprocess.run(**program("train_gates.py", *arguments, "pace=3"), capture_output=True, timeout=300)
    assert done.returncode == 2 and "GateTrainingConfig has no 'pace'" in done.stderr


@pytest.fixture(scope="module")
def train_gates():
    """The program as a module."""
    spec = spec_from_file_location("train_gates", EXAMPLES / "train_gates.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_are_json_or_plain_words(train_gates):
    given = ["max_steps=3", "learning_rate=1e-2", "gradient_checkpointing=true", "balance=turn"]
    assert train_gates.read_settings(given) == {
        "max_steps": 3, "learning_rate": 0.01, "gradient_checkpointing": True, "balance": "turn",
    }  # fmt: skip


def test_rows_are_lines(train_gates, tmp_path):
    rows = [{"prompt": "a\u2028b", "response": "c", "task": "one"}] * 2
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "rows.jsonl").write_text("\n\n".join(lines), encoding=encoding)
        assert train_gates.read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}')
    with pytest.raises(ValueError, match="line 2 is not UTF-8 .* save the file as UTF-8"):
        train_gates.read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_steps", "--set max_steps has no value; write it as in --set max_steps=300"),
        ("max_steps=abc", "--set max_steps=abc: 'abc' is not JSON, such as 300, 0.01, true or null"),
        ("gradient_checkpointing=False", "--set gradient_checkpointing=False: 'False' is not JSON"),
        ("objective=joint", "--set objective=... has a name of its own; write --objective joint"),
        ("balance=word", "unknown balance 'word'; choose one of"),
        ('first={"max_steps": 3}', "first must be another GateTrainingConfig or None"),
        ("max_steps=3", "rows.jsonl, line 3 is not JSON"),
    ],
)
def test_what_the_training_program_is_given_wrongly_is_one_sentence(
    train_gates, tmp_path, monkeypatch, capsys, setting, message
):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "task": "one"}\n\n{"prompt": \n')
    options = {"base": "b", "adapters": "a", "data": str(tmp_path / "rows.jsonl"), "output": "o"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["train_gates.py", *arguments, "--set", setting])
    with pytest.raises(SystemExit) as ended:
        train_gates.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "task": "one"}')
    monkeypatch.setattr(sys, "argv", ["train_gates.py", *arguments, "--set", "max_steps=3"])
    with pytest.raises(SystemExit):
        train_gates.main()
    assert "a is not a folder; give a folder of PEFT directories" in capsys.readouterr().err.splitlines()[-1]


def request(port, path, body=None):
    data = body and json.dumps(body).encode()
    asked = urllib.request.Request(f"http://localhost:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return answer.read().decode()


def wait_until_healthy(port, server):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return request(port, "/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.3)
    server.kill()
    pytest.fail("the server did not start: " + server.communicate()[0][-3000:])


def test_the_server(saved, tokenizer):
    if missing := [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]:
        pytest.skip(f"transformers[serving] is not installed: there is no {missing[0]}")
    model, folder = saved
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--base", folder / "base", "--checkpoint", folder / "mixture", "--port", port]
    server = subprocess.Popen(
        **program("serve.py", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        wait_until_healthy(port, server)
        assert [entry["id"] for entry in json.loads(request(port, "/v1/models"))["data"]] == ["meteora"]
        settings = {"model": "meteora", "max_tokens": 5, "temperature": 0}
        asked = {**settings, "prompt": "hello there"}
        with torch.no_grad():
            expected, chat = generated(model, tokenizer, "hello there"), generated(model, tokenizer, "hi?")
        answer = json.loads(request(port, "/v1/completions", asked))
        assert answer["choices"][0]["text"] == expected and answer["usage"]["completion_tokens"] == 5
        lines = request(port, "/v1/completions", {**asked, "stream": True}).split("data: ")[1:]
        streamed = [json.loads(line)["choices"][0]["text"] for line in lines if line.strip() != "[DONE]"]
        assert "".join(streamed) == expected
        messages = [{"role": "user", "content": "hi"}]
        answer = json.loads(request(port, "/v1/chat/completions", {**settings, "messages": messages}))
        assert answer["choices"][0]["message"]["content"] == chat
    finally:
        server.terminate()
        output = server.communicate(timeout=60)[0]
    assert "Application shutdown complete" in output
