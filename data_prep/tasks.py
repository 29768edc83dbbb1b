"""The catalogue of tasks: the paper's 28, and three made-up ones for tests without a network.

Metrics follow the authors' evaluation code (repository NJUDeepEngine/meteora, eval/eval.py); prompts of the hub
tasks follow its data/dataset_presets.py. Categories are ours; the paper has none.
"""

from dataclasses import dataclass

from .errors import UnknownTaskError


@dataclass(frozen=True)
class Task:
    """One task: where its examples come from and how its answers are scored.

    name: the adapter's and the directory's name.
    source: "bigbench" (the pinned package), "hub" (Hugging Face datasets) or "toy" (generated).
    accuracy: "substring", "exact", "number" (last number), "yesno" (first word) or None when only text metrics apply.
    text_metrics: any of "bleu", "rouge".
    choices_header: for tasks whose BIG-bench prompt does not list the choices but the paper's does, the text put
        between the question and the `choice: ...` lines; None elsewhere.
    hub_path, hub_config: repository and configuration on the hub.
    prompt_template, response_template: `str.format` templates over a hub row's fields.
    """

    name: str
    category: str
    source: str
    accuracy: str | None
    text_metrics: tuple[str, ...] = ()
    choices_header: str | None = None
    hub_path: str | None = None
    hub_config: str | None = None
    prompt_template: str | None = None
    response_template: str | None = None

    @property
    def append_choices(self) -> bool:
        """True if the paper adds `choice: ...` lines that BIG-bench itself leaves out."""
        return self.choices_header is not None


def _bigbench(name: str, category: str, accuracy: str | None, text: tuple[str, ...] = (), header: str | None = None):
    return Task(name, category, "bigbench", accuracy, text, choices_header=header)


def _hub(name, category, accuracy, text, path, config, prompt, response):
    return Task(name, category, "hub", accuracy, text, None, path, config, prompt, response)


def _news(language: str, config: str, instruction: str) -> Task:
    return _hub(
        f"news_commentary_{language}", "translation", None, ("bleu",), "Helsinki-NLP/news_commentary", config,
        f"{instruction}\n{{{language}}}", "{en}",
    )  # fmt: skip


_BOTH = ("bleu", "rouge")

_PAPER_TASKS = (
    _bigbench("abstract_narrative_understanding", "reading", "substring", header="\n"),
    _hub("alpaca", "instructions", None, _BOTH, "tatsu-lab/alpaca", None, "{instruction}", "{output}"),
    _hub(
        "cnn_dailymail", "summarization", None, _BOTH, "abisee/cnn_dailymail", "3.0.0",
        "Generate a summarization of the news article.\n{article}", "{highlights}",
    ),  # fmt: skip
    _bigbench("contextual_parametric_knowledge_conflicts", "reading", "substring"),
    _bigbench("cs_algorithms", "mathematics", "exact"),
    _bigbench("disfl_qa", "reading", "substring"),
    _bigbench("elementary_math_qa", "mathematics", "exact"),
    _bigbench("epistemic_reasoning", "logic", "exact"),
    _bigbench("formal_fallacies_syllogisms_negation", "logic", "exact"),
    _bigbench("goal_step_wikihow", "common sense", "substring"),
    _hub("gsm8k", "mathematics", "number", (), "openai/gsm8k", "main", "{question}", "{answer}"),
    _bigbench("language_identification", "language", "substring"),
    _bigbench("linguistics_puzzles", "language", None, _BOTH),
    _bigbench("logical_deduction", "logic", "substring", header=" Which choice is correct?\n"),
    _news("de", "de-en", "Den folgenden Text ins Englische übersetzen."),
    _news("es", "en-es", "Traducir las siguientes frases al inglés."),
    _news("it", "en-it", "Tradurre le seguenti frasi in inglese."),
    _bigbench("object_counting", "mathematics", "substring"),
    _bigbench("paragraph_segmentation", "language", "exact"),
    _bigbench("play_dialog_same_or_different", "dialogue", "substring"),
    _bigbench("question_selection", "reading", "substring"),
    _bigbench("reasoning_about_colored_objects", "logic", "substring"),
    _bigbench("strategyqa", "common sense", "yesno", _BOTH),
    _bigbench("topical_chat", "dialogue", None, _BOTH),
    _bigbench("tracking_shuffled_objects", "logic", "exact", header="\n"),
    _bigbench("unit_conversion", "mathematics", "exact", header="\n"),
    _bigbench("vitaminc_fact_verification", "reading", "substring"),
    _bigbench("winowhy", "common sense", "exact"),
)

TASKS: dict[str, Task] = {task.name: task for task in _PAPER_TASKS}
"""The paper's 28 tasks by name, alphabetically."""

TOY_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("toy_echo", "toy", "toy", "exact", _BOTH),
        Task("toy_first_letter", "toy", "toy", "substring"),
        Task("toy_parity", "toy", "toy", "exact"),
    )
}
"""Three generated tasks that need no download; results on them claim nothing."""


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        UnknownTaskError: naming the known tasks.
    """
    task = TASKS.get(name) or TOY_TASKS.get(name)
    if task is None:
        known = ", ".join([*TASKS, *TOY_TASKS])
        raise UnknownTaskError(f"There is no task {name!r}; choose among: {known}.")
    return task
