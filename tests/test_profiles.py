"""Profiles: those that ship are valid and within what they promise; a mistake is named in one sentence."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import yaml

from data_prep.tasks import TASKS, TOY_TASKS
from meteora.study.baselines import TRAINED_SINGLE
from meteora.study.merging import MERGINGS
from meteora.study.opening import OTHERS
from meteora.study.profiles import (
    METHODS,
    PROFILES,
    PROTOCOLS,
    REPOSITORY,
    ProfileError,
    load_profile,
    profile_names,
)

ALL = profile_names()
PUBLISHED_10 = (
    "logical_deduction", "question_selection", "abstract_narrative_understanding", "goal_step_wikihow", "winowhy",
    "strategyqa", "disfl_qa", "news_commentary_de", "alpaca", "linguistics_puzzles",
)  # fmt: skip


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
STUDY = {"sizes": [[32, 32]], "tokens": [1], "adapters": [3]}


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


def test_smollm2_holds_what_the_record_needs() -> None:
    profile = load_profile("smollm2")
    assert profile.evaluation.methods == METHODS and profile.evaluation.test_samples >= 100
    composite = profile.composite
    assert {size: len(tasks) for size, tasks in composite.sizes.items()} == {3: 3, 5: 5, 10: 10}
    assert composite.sizes[10][:7] == PUBLISHED_10[:7] and composite.sizes[10][-1] == PUBLISHED_10[-1]
    assert {"language_identification", "topical_chat"} == set(composite.sizes[10]) - set(PUBLISHED_10)
    assert composite.protocols == PROTOCOLS and composite.zero_shot == ("numbered", "guided")
    assert composite.temperature == {3: 15, 5: 20, 10: 30} and composite.items >= 100
    assert [composite.count(protocol) for protocol in PROTOCOLS] == [100, 100, 200]
    assert [load_profile("laptop").composite.count(protocol) for protocol in PROTOCOLS] == [16, 16, 16]
    assert {"base", "peft", "lora_f", "lora_b", "meteora_top2"} <= set(composite.methods)
    assert set(composite.methods) | set(profile.ablations.composite_methods) == set(METHODS)
    for section in (profile.lora_b, profile.lora_f):
        assert section.config() == profile.adapters.config(), "trained alike"
    everything = {f.name: getattr(profile.ablations, f.name) for f in dataclasses.fields(profile.ablations)}
    assert all(everything.values()), "no study is left out"
    trainings = [profile.gate_config(**options) for options in profile.ablations.gates.values()]
    assert trainings[0] == profile.gate_config() and {config.objective for config in trainings} == {"gate", "joint"}
    assert [stage.objective for stage in profile.gate_config().stages()] == ["gate", "joint"]
    assert max(profile.ablations.speed.adapters) == 256
    assert load_profile("laptop").ablations is None


def test_laptop_keeps_its_promises() -> None:
    laptop = load_profile("laptop")
    assert laptop.evaluation.test_samples >= 40
    assert laptop.gate_config().objective == "gate"
    assert laptop.adapters.path == REPOSITORY / "results/laptop/adapters"
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
    states = {"base", "peft", "meteora_top1", "meteora_top2"}
    assert set(METHODS) == {*states, *MERGINGS, *TRAINED_SINGLE, *OTHERS}
    assert set(load_profile("smoke").evaluation.methods) == set(METHODS), "the tests run all of them"


def test_a_path_is_a_profile_too(write) -> None:
    profile = load_profile(write(seed=7, root="/somewhere"))
    assert (profile.seed, profile.root) == (7, "/somewhere")
    assert profile.gate_config().seed == 7
    assert profile.to_dict()["composite"]["sizes"][2] == ("toy_echo", "toy_parity")


def test_xlora_is_trained_as_the_gates_are_but_for_what_is_its_own(write) -> None:
    profile = load_profile(write(seed=5, gates={"learning_rate": 0.5, "max_steps": 7, "samples_per_step": 3}, xlora={}))
    config = profile.xlora_config()
    assert (config.max_steps, config.samples_per_step, config.seed, config.learning_rate) == (7, 3, 5, 1e-3)
    profile = load_profile(write(xlora={"learning_rate": 0.1, "max_steps": 2}))
    assert (profile.xlora_config().learning_rate, profile.xlora_config().max_steps) == (0.1, 2)


def test_the_training_options_reach_the_configs(write) -> None:
    profile = load_profile(write(gates__learning_rate=0.5, adapters__training={"max_steps": 3, "seed": 9}))
    assert profile.gate_config().learning_rate == 0.5
    config = profile.adapters.config(seed=1)
    assert (config.max_steps, config.seed, config.rank, config.alpha) == (3, 9, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, r"mine\.yaml: unknown key sed; known are name, .*seed"),
        ({"data__tarin": 1}, r"unknown key data\.tarin; known are source, train, valid, test"),
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
        ({"data__max_characters": 0}, r"data\.max_characters must be at least 1"),
        ({"xlora": {"objective": "gate"}}, r"xlora has no option 'objective'"),
        ({"lorahub": {"evaluations": 1}}, r"lorahub\.evaluations must be at least 2"),
        ({"evaluation__tokens_per_batch": 0}, r"evaluation\.tokens_per_batch must be at least 1"),
        ({"composite__zero_shot": ["sequential"]}, r"composite\.zero_shot has no choice 'sequential'; known are numbered"),
        ({"evaluation__methods": []}, r"evaluation\.methods must name at least one"),
        ({"composite__protocols": ["loud"]}, r"composite\.protocols has no choice 'loud'"),
        ({"composite__sizes": {3: ["toy_echo"]}}, r"has no choice 2; known are 3|names 1 tasks instead of 3"),
        ({"composite__sizes": {2: ["toy_echo", "winowhy"]}, "composite__temperature": {}}, r"no choice 'winowhy'"),
        ({"composite__temperature": {2: 0}}, r"composite\.temperature\.2 must be positive"),
        ({"composite__temperature": {2: float("nan")}}, r"composite\.temperature\.2 must be positive and finite"),
        ({"model__source": ""}, r"model\.source must not be empty"),
        ({"lora_b__source": " "}, r"lora_b\.source must not be empty"),
        ({"needs__minutes": -5}, r"needs\.minutes must be at least 0"),
        ({"data__test": 2}, r"evaluation\.test_samples are \d+, but data\.test is 2; make it as many"),
        ({"composite__items": 3000}, r"composites of protocol \w+ are 3000, but data\.test is"),
        ({"composite__shots": 5000}, r"composite\.shots are 5000, but data\.train is"),
        ({"composite__items": 0}, r"composite\.items must be at least 1"),
        ({"composite__sequential_items": 0}, r"composite\.sequential_items must be at least 1"),
        ({"benchmark__backends": ["cuda"]}, r"benchmark\.backends has no choice 'cuda'; known are auto, loop"),
        ({"benchmark__layers": []}, r"benchmark\.layers must name at least one"),
        ({"benchmark__layers": [STUDY | {"sizes": [[32, 32, 32]]}]}, r"benchmark\.layers\.sizes must have 2 entries"),
        ({"benchmark__layers": [STUDY | {"tokens": [0]}]}, r"benchmark\.layers\.tokens must be at least 1"),
        ({"benchmark__layers": [STUDY | {"routings": ["random"]}]}, r"has no choice 'random'; known are uniform"),
        ({"benchmark__layers": [STUDY | {"modes": []}]}, r"benchmark\.layers\.modes must name at least one"),
        ({"benchmark__layers": [STUDY | {"launch": ["graph"]}]}, r"unknown key benchmark\.layers\.launch; known are"),
        ({"benchmark__tasks__prompts": 0}, r"benchmark\.tasks\.prompts must be at least 1"),
        ({"lora_b": None}, r"the profile needs a section lora_b"),
        ({"ablations__sampels": 3}, r"unknown key ablations\.sampels; known are samples, top_k"),
        ({"ablations__samples": 0}, r"ablations\.samples must be at least 1"),
        ({"ablations__top_k": [4]}, r"ablations\.top_k must be at most 3, the number of tasks"),
        ({"ablations__adapters": [2, 9]}, r"ablations\.adapters must be at most 3"),
        ({"ablations__temperatures": [0]}, r"ablations\.temperatures must be positive"),
        ({"ablations__told": {"none": [2, 2]}}, r"ablations\.told\['none'\] must be a first layer and the one behind"),
        ({"ablations__added_task": "winowhy"}, r"ablations\.added_task has no choice 'winowhy'; known are toy_echo"),
        ({"ablations__held_out": ["toy_echo", "toy_parity"]}, r"ablations\.held_out must leave two tasks"),
        ({"ablations__foreign": ["toy_echo"]}, r"ablations\.foreign must name tasks that are none of the profile's"),
        ({"ablations__gates": {"mine": {"beeta": 1}}}, r"gates has no option 'beeta'"),
        ({"gates__first": {"beeta": 1}}, r"gates\.first has no option 'beeta'"),
        ({"ablations__composite_methods": ["magic"]}, r"ablations\.composite_methods has no choice 'magic'"),
        ({"ablations__speed": {"adapters": [], "batch": [1], "tokens": [1]}}, r"adapters must name at least one"),
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
