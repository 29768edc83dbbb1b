"""The hub route, on local copies of the dataset repositories with the same files, configurations and fields."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_prep import hub
from data_prep.errors import DataError, DownloadError
from data_prep.hub import AUTHORS_DATASET, load_authors_task, load_hub_task
from data_prep.tasks import TASKS, get_task

ROWS = json.loads((Path(__file__).parent / "fixtures" / "hub_rows.json").read_text(encoding="utf-8"))
HUB_TASKS = [name for name, task in TASKS.items() if task.source == "hub"]


def _repository(folder, configs):
    """A dataset repository as the hub has them: parquet files, and a README that lists the configurations."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f'- config_name: "{config}"', "  data_files:"]
        for split, rows in splits.items():
            directory = folder / config
            directory.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{split}-00000-of-00001.parquet")
            lines += [f"  - split: {split}", f'    path: "{config}/{split}-*"']
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("asked the network"))
    root = tmp_path / "mirror"
    gsm8k, news = ROWS["openai/gsm8k"]["rows"], ROWS["Helsinki-NLP/news_commentary"]
    _repository(
        root / "openai/gsm8k",
        {"main": {"train": gsm8k, "test": gsm8k[1:]}, "socratic": {"train": [{"question": "no"}]}},
    )
    cnn = ROWS["abisee/cnn_dailymail"]["rows"]
    _repository(root / "abisee/cnn_dailymail", {"3.0.0": {"train": cnn, "validation": cnn[:1], "test": cnn[1:]}})
    _repository(root / "tatsu-lab/alpaca", {"default": {"train": ROWS["tatsu-lab/alpaca"]["rows"]}})
    _repository(
        root / "Helsinki-NLP/news_commentary",
        {config: {"train": news["rows"][language]} for language, config in news["config"].items()},
    )
    for task, answers in (("gsm8k", range(20)), ("winowhy", range(3)), ("vitaminc_fact_verification", range(3))):
        folder = root / AUTHORS_DATASET / task
        folder.mkdir(parents=True)
        listed = "\n  choice: 0é\n  choice: True or not\nA:" if task.startswith("vitaminc") else ""
        for split in ("train", "test"):
            rows = [{"prompt": f"[INST] {task} {split} {n}{listed} [/INST]\n", "response": f"{n}é"} for n in answers]
            rows += [{"prompt": "[INST] nobody answers [/INST]\n", "response": " "}]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("name", HUB_TASKS)
def test_every_hub_task_loads(mirror, name):
    train, test = load_hub_task(get_task(name), mirror)
    for row in train + (test or []):
        assert set(row) == {"task", "id", "prompt", "response", "choices"} and row["task"] == name
        assert row["prompt"].startswith("[INST] ") and row["prompt"].endswith(" [/INST]\n") and row["response"]
    assert (test is not None) == (name in ("gsm8k", "cnn_dailymail"))


def test_prompts_are_the_papers(mirror):
    def first(name, index=0):
        row = load_hub_task(get_task(name), mirror)[0][index]
        return row["prompt"], row["response"]

    assert first("gsm8k") == (
        "[INST] A box holds 3 pens. How many pens are in 4 boxes? [/INST]\n", "3 * 4 = <<3*4=12>>12\n#### 12",
    )  # fmt: skip
    # Braces in a text are text.
    assert first("cnn_dailymail", 1)[0] == (
        "[INST] Generate a summarization of the news article.\nA cat sat {in} a tree for two days. [/INST]\n"
    )
    assert first("alpaca") == ("[INST] Name a colour. [/INST]\n", "Blue.")
    assert first("alpaca", 1) == ("[INST] Name the noun.\nThe dog barks. [/INST]\n", "dog")
    assert first("news_commentary_de") == (
        "[INST] Den folgenden Text ins Englische übersetzen.\nDas Ende der Krise [/INST]\n", "The End of the Crisis",
    )  # fmt: skip
    assert first("news_commentary_es")[0] == (
        "[INST] Traducir las siguientes frases al inglés.\nEl fin de la crisis [/INST]\n"
    )
    assert first("news_commentary_it")[0] == (
        "[INST] Tradurre le seguenti frasi in inglese.\nLa fine della crisi [/INST]\n"
    )


def test_rows_without_an_answer_are_left_out(mirror):
    assert len(load_hub_task(get_task("alpaca"), mirror)[0]) == 2


@pytest.mark.parametrize(
    "name, choices",
    [("gsm8k", None), ("winowhy", ["0é", "1é", "2é"]), ("vitaminc_fact_verification", ["0é", "True or not"])],
)
def test_the_authors_data(mirror, name, choices):
    """Choices are what a prompt lists, or a task's answers, if these are few."""
    train, test = load_authors_task(get_task(name), mirror)
    assert len(test) == len(train) == (20 if name == "gsm8k" else 3), "without the row that has no answer"
    assert train[2]["prompt"].startswith(f"[INST] {name} train 2") and train[2]["prompt"].endswith(" [/INST]\n")
    facts = {key: train[2][key] for key in ("task", "id", "response", "choices")}
    assert facts == {"task": name, "id": f"{name}/train/2", "response": "2é", "choices": choices}
    assert all(row["choices"] == choices for row in train + test)


def test_a_repository_that_is_not_there_is_named(mirror, tmp_path):
    with pytest.raises(DownloadError, match="gsm8k needs the data set openai/gsm8k.*does not exist: copy it there"):
        load_hub_task(get_task("gsm8k"), tmp_path / "elsewhere")
    with pytest.raises(DownloadError, match="alpaca needs the data set NJUDeepEngine/meteora_dataset"):
        load_authors_task(get_task("alpaca"), mirror)


def test_other_fields_than_expected_are_named(mirror):
    _repository(mirror / "tatsu-lab/alpaca", {"default": {"train": [{"question": "q", "input": ""}]}})
    with pytest.raises(DataError, match="tatsu-lab/alpaca has no field 'instruction' for task alpaca"):
        load_hub_task(get_task("alpaca"), mirror)


def test_without_a_network_one_sentence_and_no_waiting(monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(DownloadError, match="gsm8k needs the data set openai/gsm8k.*does not answer: check"):
        load_hub_task(get_task("gsm8k"))
