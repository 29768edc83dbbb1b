"""A study of what adapters were trained on: single questions, or composites as well.

An adapter that only ever answered one question ends the text behind its answer, and numbered composites end with the
first. Here the adapters of the composites' tasks, LoRA-B and the gates learn from composite texts too (`formats.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.prepare import load_split
from meteora import AdapterTrainingConfig, MeteoraModel, train_adapters, train_gates
from meteora.adapters import adapter_directory
from meteora.study.ablation_settings import FormatStudy
from meteora.study.ablations import Ablations, Variant
from meteora.study.ablations_composites import answer_all_composites, composite_settings
from meteora.study.baselines import Method, build_methods, share_weights
from meteora.study.formats import adapter_rows, composite_texts, gate_row
from meteora.study.measures import Example, Row
from meteora.study.transcripts import gate_examples


def formats_study(ablations: Ablations) -> Iterator[Variant]:
    """Composites of every size and protocol, and single questions, answered by models with and without that training.

    The tasks are those of the composites. LoRA-B sees the same samples as all the adapters together.
    """
    settings, profile = ablations.settings.formats, ablations.profile
    if settings is None:
        return
    tasks = [task for task in ablations.tasks if any(task in chosen for chosen in profile.composite.sizes.values())]
    names = ["base", "peft", "meteora_top2"] + (["lora_b"] if profile.lora_b is not None else [])
    shared = {"composite": composite_settings(ablations), "items": ablations.settings.composite_items}

    def as_trained() -> list[Row]:
        methods = {name: ablations.study.methods[name] for name in names}
        return _measure(ablations, methods, tasks, "own questions")

    def with_composites() -> list[Row]:
        methods = build_methods(names, *_train(ablations, tasks))
        return _measure(ablations, methods, tasks, "own questions and composites")

    yield Variant("own questions", shared, as_trained)
    trained = [*map(dataclasses.asdict, (settings, profile.adapters)), profile.gates, profile.data.transcripts]
    yield Variant("own questions and composites", {**shared, "trained": trained}, with_composites)


def training_data(
    examples: Mapping[str, Sequence[Example]], settings: FormatStudy, transcripts: int, *, seed: int
) -> tuple[dict[str, list[dict]], list[dict]]:
    """Adapter's name -> its rows, and the rows for gates: examples and composite texts of them.

    Args:
        transcripts: how many of single questions, for the gates.
    """
    texts = composite_texts(
        examples, settings.texts, sizes=settings.sizes, shots=settings.shots, characters=settings.characters, seed=seed
    )
    rows = {task: list(of_task) for task, of_task in examples.items()}
    for text in texts:
        for task, answer in adapter_rows(text):
            rows[task].append(answer)
    return rows, gate_examples(examples, transcripts, seed=seed) + [gate_row(text) for text in texts]


def _train(ablations: Ablations, tasks: Sequence[str]) -> tuple[MeteoraModel, MeteoraModel | None]:
    """The model of the tasks' adapters, and that of LoRA-B, both trained on composite texts as well."""
    settings, profile = ablations.settings.formats, ablations.profile
    plain, tokenizer = ablations.study.plain, ablations.study.tokenizer
    train, valid = ({t: load_split(ablations.workspace.data, t, split) for t in tasks} for split in ("train", "valid"))
    rows, for_gates = training_data(train, settings, profile.data.transcripts, seed=profile.seed)
    held_out = training_data(valid, dataclasses.replace(settings, texts=settings.valid_texts), 0, seed=profile.seed)[0]
    config = dataclasses.replace(profile.adapters.config(profile.seed), **settings.training)
    folder = ablations.folder / "formats"

    def adapters(datasets: Mapping, validation: Mapping, config: AdapterTrainingConfig) -> dict[str, Path]:
        base = share_weights(plain)
        train_adapters(base, datasets, config, tokenizer=tokenizer, output_dir=folder, validation=validation)
        return {name: adapter_directory(folder, name) for name in datasets}

    model = MeteoraModel.from_adapters(share_weights(plain), adapters(rows, held_out, config)).eval()
    train_gates(model, for_gates, profile.gate_config(max_length=config.max_length), tokenizer=tokenizer)
    if profile.lora_b is None:
        return model, None
    union, unseen = ({"lora_b": [row for of_task in part.values() for row in of_task]} for part in (rows, held_out))
    as_many = dataclasses.replace(config, samples_per_step=len(tasks) * config.samples_per_step)
    return model, MeteoraModel.from_adapters(share_weights(plain), adapters(union, unseen, as_many)).eval()


def _measure(ablations: Ablations, methods: Mapping[str, Method], tasks: Sequence[str], name: str) -> list[Row]:
    valid = {task: ablations.valid[task] for task in tasks}
    rows = ablations.accuracy_rows(ablations.answer(methods, valid, "formats", name), against=None)
    folder = ablations.answers_folder("formats", name.replace(" ", "_"))
    count = ablations.settings.composite_items
    return rows + answer_all_composites(ablations, methods, lambda protocol: count, folder)


STUDIES: dict[str, Callable[[Ablations], Iterator[Variant]]] = {"formats": formats_study}
