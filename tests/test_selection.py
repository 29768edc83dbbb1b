"""The choice of the tasks that ship, and the training of their adapters, on the tiny model."""

import json

import pandas
import pytest

from data_prep.base_models import load_base_model
from data_prep.prepare import prepare_tasks
from meteora import MeteoraModel
from meteora.study.collection import HISTORY
from meteora.study.profiles import load_profile
from meteora.study.selection import choose, data_section, select_and_train


def test_the_largest_gains_are_chosen_and_not_the_largest_accuracies():
    table = pandas.DataFrame({"task": list("abcd"), "base": [0.0, 0.8, 0.1, 0.0], "peft": [0.5, 0.9, 0.7, 0.2]})
    assert choose(table, 2) == ["c", "a"]


def test_a_card_names_every_task():
    assert "- `one`\n- `two`" in data_section(["one", "two"])


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    profile = load_profile("smoke")
    prepare_tasks(list(profile.tasks), folder / "data", sizes={"train": 12, "valid": 4, "test": 4}, seed=0)
    table = select_and_train(profile, folder / "data", folder / "out", count=2, longest=1000.0, device="cpu")
    return profile, folder, table


def test_what_ships(shipped):
    profile, folder, table = shipped
    chosen = table[table["chosen"]]["task"].tolist()
    assert len(chosen) == 2 and set(table["task"]) == set(profile.tasks)
    pandas.testing.assert_frame_equal(
        pandas.read_csv(folder / "out" / "metrics" / "task_selection.csv"), table, check_dtype=False
    )
    adapters = folder / "out" / "adapters"
    assert sorted(path.name for path in adapters.iterdir()) == sorted([*chosen, "lora_b", HISTORY])
    card = (adapters / "lora_b" / "README.md").read_text()
    assert all(f"- `{task}`" in card for task in chosen) and "| training samples | 24 |" in card
    assert f"- `{chosen[0]}`" in (adapters / chosen[0] / "README.md").read_text()
    made_by = json.loads((folder / "out" / "metrics" / "task_selection.json").read_text())
    assert made_by["versions"]["torch"] and made_by["adapters"]["rank"] == profile.adapters.rank


def test_lora_b_sees_the_union_in_every_step(shipped):
    profile, folder, table = shipped
    history = pandas.read_csv(folder / "out" / "adapters" / HISTORY)
    assert set(history["task"]) == {*profile.tasks, "lora_b"}
    config = json.loads((folder / "out" / "metrics" / "task_selection.json").read_text())["adapters"]
    card = (folder / "out" / "adapters" / "lora_b" / "README.md").read_text()
    assert f"| samples per step | {2 * config['samples_per_step']} |" in card


def test_the_shipped_adapters_load(shipped):
    profile, folder, table = shipped
    base, _ = load_base_model(profile.model.source)
    model = MeteoraModel.from_adapters(base, folder / "out" / "adapters")
    assert set(model.adapter_names) == {*table[table["chosen"]]["task"], "lora_b"}
