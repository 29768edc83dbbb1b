"""Profiles: those that ship are valid and within what they promise; a mistake is named in one sentence."""

from __future__ import annotations

import copy

import pytest
import yaml

from data_prep.tasks import TASKS, TOY_TASKS
from meteora.study import baselines
from meteora.study.profiles import METHODS, PROFILES, REPOSITORY, ProfileError, load_profile, profile_names

ALL = profile_names()


def values_of(name: str) -> dict:
    return yaml.safe_load((PROFILES / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def write(tmp_path):
    """A function that writes profile smoke with some values replaced (``a.b`` for nested keys) and gives its path."""

    def writer(**changes):
        values = copy.deepcopy(values_of("smoke"))
        for key, value in changes.items():
            *folders, last = key.split("__")
            section = values
            for folder in folders:
                section = section[folder]
            if value is DELETE:
                del section[last]
            else:
                section[last] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return writer


DELETE = object()


def test_the_profiles_of_the_design_are_there() -> None:
    assert ALL == ["laptop", "llama2-13b", "llama3-8b", "smoke", "smollm2"]


@pytest.mark.parametrize("name", ALL)
def test_shipped_profiles_are_valid(name) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.gate_config().seed == profile.seed
    assert profile.adapters.config().rank == profile.adapters.rank
    assert profile.root is None and profile.cache is None
    assert profile.evaluation.test_samples <= (profile.data.test or profile.evaluation.test_samples)


def test_tasks_of_the_shipped_profiles() -> None:
    bigbench = {name for name, task in TASKS.items() if task.source == "bigbench"}
    assert set(load_profile("smoke").tasks) == set(TOY_TASKS)
    assert set(load_profile("smollm2").tasks) == bigbench and len(bigbench) == 22
    for name in ("llama3-8b", "llama2-13b"):
        assert list(load_profile(name).tasks) == list(TASKS)
    laptop = load_profile("laptop")
    assert len(laptop.tasks) == 5 and set(laptop.tasks) <= bigbench
    assert all(TASKS[task].accuracy for task in laptop.tasks)


def test_laptop_keeps_its_promises() -> None:
    laptop = load_profile("laptop")
    assert laptop.evaluation.test_samples >= 40
    assert laptop.gate_config().objective == "gate"
    assert laptop.adapters.path == REPOSITORY / "results/smollm2/adapters"
    assert set(laptop.evaluation.methods) == {
        "base", "peft", "meteora_top1", "meteora_top2", "lora_b", "linear", "ties",
    }  # fmt: skip
    assert laptop.composite.protocols == ("numbered", "guided", "sequential")


@pytest.mark.parametrize("name", ["smoke", "smollm2", "llama3-8b", "llama2-13b"])
def test_lora_b_sees_as_many_samples_as_all_adapters_together(name) -> None:
    profile = load_profile(name)
    adapters, single = profile.adapters.config(), profile.lora_b.config()
    assert (adapters.max_steps, adapters.samples_per_step) == (single.max_steps, single.samples_per_step)


def test_methods_are_those_the_study_can_run() -> None:
    assert set(METHODS) == {"base", "peft", *baselines.METEORA, *baselines.MERGINGS, *baselines.TRAINED_SINGLE}


def test_a_path_is_a_profile_too(write) -> None:
    profile = load_profile(write(seed=7, root="/somewhere"))
    assert (profile.seed, profile.root) == (7, "/somewhere")
    assert profile.gate_config().seed == 7
    assert profile.to_dict()["composite"]["sizes"][2] == ("toy_echo", "toy_parity")


def test_the_training_options_reach_the_configs(write) -> None:
    profile = load_profile(write(gates__learning_rate=0.5, adapters__training={"max_steps": 3, "seed": 9}))
    assert profile.gate_config().learning_rate == 0.5
    config = profile.adapters.config(seed=1)
    assert (config.max_steps, config.seed, config.rank, config.alpha) == (3, 9, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, r"mine\.yaml: unknown key sed; known are name, .*seed"),
        ({"data__tarin": 1}, r"unknown key data\.tarin; known are train, valid, test"),
        ({"model": DELETE}, r"key model is missing"),
        ({"evaluation__batch_size": DELETE}, r"key evaluation\.batch_size is missing"),
        ({"seed": "zero"}, r"seed must be a whole number, not 'zero'"),
        ({"seed": True}, r"seed must be a whole number, not True"),
        ({"seed": -1}, r"seed must be at least 0, not -1"),
        ({"threads": 0}, r"threads must be at least 1"),
        ({"name": "a/b"}, r"name must be a plain word"),
        ({"data__train": 0}, r"data\.train must be at least 1, not 0"),
        ({"data": [1]}, r"data must be a mapping"),
        ({"tasks": "toy_echo"}, r"tasks must be a list, not 'toy_echo'"),
        ({"tasks": []}, r"tasks must name at least one"),
        ({"tasks": ["toy_echo", "toy_echo"]}, r"tasks names one twice"),
        ({"tasks": ["gsm9k"]}, r"There is no task 'gsm9k'; choose among: .*gsm8k"),
        ({"model__dtype": "int3"}, r"model\.dtype has no choice 'int3'; known are float32"),
        ({"model__device": "tpu"}, r"model\.device has no choice 'tpu'"),
        ({"gates__objektive": "gate"}, r"gates has no option 'objektive'; known are .*objective"),
        ({"gates__objective": "both"}, r"unknown objective 'both'"),
        ({"adapters__training": {"rank": 3}}, r"adapters\.training has no option 'rank'"),
        ({"adapters__rank": 0}, r"adapters\.rank must be"),
        ({"evaluation__methods": ["peft", "magic"]}, r"evaluation\.methods has no choice 'magic'; known are base"),
        ({"evaluation__methods": []}, r"evaluation\.methods must name at least one"),
        ({"composite__protocols": ["loud"]}, r"composite\.protocols has no choice 'loud'"),
        ({"composite__sizes": {3: ["toy_echo"]}}, r"has no choice 2; known are 3|names 1 tasks instead of 3"),
        ({"composite__sizes": {2: ["toy_echo", "winowhy"]}, "composite__temperature": {}}, r"no choice 'winowhy'"),
        ({"composite__temperature": {2: 0}}, r"composite\.temperature\.2 must be positive"),
        ({"composite__items": 0}, r"composite\.items must be at least 1"),
        ({"benchmark__backends": ["cuda"]}, r"benchmark\.backends has no choice 'cuda'; known are auto, loop"),
        ({"benchmark__layers": [[32, 32, 32]]}, r"benchmark\.layers must have 2 entries"),
        ({"lora_b": None}, r"the profile needs a section lora_b"),
    ],
)
def test_mistakes_are_named(write, changes, message) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(write(**changes))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(ProfileError, match="no profile 'desktop'; choose one of laptop, llama2-13b"):
        load_profile("desktop")


def test_invalid_yaml_is_one_sentence(tmp_path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("tasks: [a\nname: x: y", encoding="utf-8")
    with pytest.raises(ProfileError, match="not valid YAML") as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)
