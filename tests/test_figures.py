"""Figures: what their axes hold, for 1 to 28 tasks, that labels do not overlap, and that the HTML escapes its text."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from data_prep.tasks import TASKS
from meteora.study import figures
from meteora.study.figures_style import METHOD_STYLES, PALETTE, adapter_colors, readable_on
from meteora.study.figures_tokens import token_shade

METHODS = ["base", "peft", "meteora_top1", "meteora_top2", "lora_b", "linear", "ties"]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def independent(tasks, methods=METHODS):
    rows = []
    for t, task in enumerate(tasks):
        for m, method in enumerate(methods):
            value = (t + m + 1) / (len(tasks) + len(methods))
            rows.append((task, method, "accuracy", value, value - 0.1, value + 0.1, 40))
    return pd.DataFrame(rows, columns=["task", "method", "metric", "value", "low", "high", "n"])


def routing(tasks, layers=3):
    rows = []
    for layer in range(layers):
        for module in MODULES:
            for task in tasks:
                for adapter in tasks:
                    own = 0.5 + 0.1 * layer
                    share = own if task == adapter else (1 - own) / (len(tasks) - 1)
                    rows.append((layer, module, task, adapter, share))
    return pd.DataFrame(rows, columns=["layer", "module", "task", "adapter", "share"])


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def visible_axes(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def drawn(figure):
    """Draw the figure, so that everything has its place, and return what measures it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def overlapping(axis_labels, renderer):
    boxes = [text.get_window_extent(renderer) for text in axis_labels if text.get_text()]
    boxes = [box.shrunk(0.9, 0.7) for box in boxes]
    return [(a, b) for n, a in enumerate(boxes) for b in boxes[n + 1 :] if a.overlaps(b)]


@pytest.mark.parametrize("count", [2, 3, 5, 28])
def test_radar_has_a_spoke_for_every_task_and_a_closed_line_for_every_method(count):
    rows = independent(list(TASKS)[:count])
    figure = figures.figure3_radar(rows)
    [axes] = figure.axes
    assert len(axes.get_xticks()) == count
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert list(lines) == ["PEFT (told the task)", "MeteoRA top-1", "MeteoRA top-2", "LoRA-B"]
    values = rows[rows["method"] == "peft"].sort_values("task")["value"].tolist()
    assert lines["PEFT (told the task)"].tolist() == [*values, values[0]]
    shown = [label.get_text().replace("\n", "") for label in axes.get_xticklabels()]
    assert shown == sorted(list(TASKS)[:count])
    assert not overlapping(axes.get_xticklabels(), drawn(figure))


@pytest.mark.parametrize("count", [2, 5, 28])
def test_dots_are_sorted_by_peft_and_have_a_mean_on_top(count):
    rows = independent(list(TASKS)[:count])
    figure = figures.figure3_dots(rows)
    [axes] = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    peft = rows[rows["method"] == "peft"].set_index("task")["value"]
    assert labels == [*peft.sort_values().index, f"mean over {count} tasks"]
    dots = {line.get_label(): line.get_xdata() for line in axes.get_lines() if line.get_linestyle() == "None"}
    assert len(dots) == len(METHODS)
    assert dots["PEFT (told the task)"] == pytest.approx([*peft.sort_values(), peft.mean()])
    assert "95%" in axes.get_xlabel()
    bars = axes.collections[0].get_segments()
    assert bars[0][:, 0] == pytest.approx(rows.iloc[0][["low", "high"]].astype(float))
    assert not overlapping(axes.get_yticklabels(), drawn(figure))


def test_legends_lie_outside_the_axes():
    for figure in (figures.figure3_radar(independent("abc")), figures.figure3_dots(independent("abc"))):
        renderer = drawn(figure)
        [legend] = figure.legends
        assert not legend.get_window_extent(renderer).overlaps(figure.axes[0].get_window_extent(renderer))


def test_composites_have_a_panel_for_each_protocol():
    rows = []
    for protocol, temperature, methods in (("guided", 15.0, METHODS[4:5]), ("sequential", 1.0, METHODS[1:2])):
        for method in methods:
            for metric, value in (("attempted", 3.0), ("correct", 1.25)):
                rows.append((3, protocol, 0, temperature, "ALL", method, metric, value, value, value, 16))
    columns = "composite protocol shots temperature subtask method metric value low high n".split()
    figure = figures.composite_summary(pd.DataFrame(rows, columns=columns))
    first, second = visible_axes(figure)
    assert first.get_title() == "composite-3, guided\n0-shot, T = 15"
    assert [label.get_text() for label in first.get_yticklabels()] == ["LoRA-B", "PEFT (told the task)"]
    places = [x for line in second.get_lines() for x in np.atleast_1d(line.get_xdata()) if x == x]
    assert places == [3.0, 1.25]
    assert "of 3" in first.get_xlabel()
    assert len(figure.axes) == 4  # two temperatures, two protocols, two of the four measured
    guessed = figures.composite_summary(pd.DataFrame(rows, columns=columns), {3: 0.9})
    assert all(axes.get_lines()[-1].get_xdata() == [0.9, 0.9] for axes in visible_axes(guessed))
    assert [text.get_text() for text in guessed.legends[0].get_texts()][-1] == "the better guess, correct"
    other = pd.DataFrame(rows, columns=columns).assign(shots=2)
    both = visible_axes(figures.composite_summary(pd.concat([pd.DataFrame(rows, columns=columns), other])))
    titles = [axes.get_title() for axes in both]
    assert titles == [f"composite-3, {run}" for run in (
        "guided\n0-shot, T = 15", "guided\n2-shot, T = 15", "sequential\n0-shot, T = 1", "sequential\n2-shot, T = 1",
    )]  # fmt: skip
    with pytest.raises(ValueError, match="no rows of sub-task ALL"):
        figures.composite_summary(pd.DataFrame(rows, columns=columns).assign(subtask="winowhy"))


def test_gate_curves_leave_out_a_loss_that_was_not_computed():
    steps = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "lm_loss": [None] * 3})
    steps = steps.assign(gate_loss=steps["loss"], gate_accuracy=[0.2, 0.5, 0.9])
    loss, accuracy = figures.gate_curves(steps, adapters=5).axes
    assert loss.get_legend_handles_labels()[1] == ["total loss", "gate cross-entropy"]
    assert accuracy.get_lines()[-1].get_ydata()[0] == 0.2 and "5" in accuracy.get_lines()[-1].get_label()
    assert accuracy.get_lines()[0].get_ydata().tolist() == [0.2, 0.5, 0.9]
    assert "nats" in loss.get_ylabel()


def test_gate_curves_mark_where_another_objective_begins():
    count = 100
    steps = pd.DataFrame({"step": range(1, 2 * count + 1), "loss": [1.0] * count + [3.0] * count})
    steps = steps.assign(lm_loss=[None] * count + [2.0] * count, gate_loss=1.0, gate_accuracy=0.5)
    loss, accuracy = figures.gate_curves(steps, adapters=5).axes
    totals = [line.get_ydata().tolist() for line in loss.get_lines() if len(line.get_xdata()) == count][:4]
    assert totals == [[1.0] * count] * 2 + [[3.0] * count] * 2, "no mean over both"
    assert loss.get_legend_handles_labels()[1] == ["total loss", "language-modelling loss", "gate cross-entropy"]
    for axes in (loss, accuracy):
        assert axes.get_lines()[-1].get_xdata() == [count + 0.5] * 2
    assert accuracy.get_legend_handles_labels()[1][-1] == "another objective"


def test_gate_curves_name_what_stands_in_for_the_language_modelling_loss():
    steps = pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0], "lm_loss": [1.0, 0.5]})
    steps = steps.assign(gate_loss=steps["loss"], gate_accuracy=[0.2, 0.5])
    loss, _ = figures.gate_curves(steps, stand_in="squared error").axes
    assert loss.get_legend_handles_labels()[1] == ["total loss", "squared error", "gate cross-entropy"]
    assert loss.get_ylabel() == "loss"


@pytest.mark.parametrize("count", [1, 6, 28])
def test_adapter_curves_mark_what_was_kept(count):
    rows = [(s, f"t{t}", "train", 1.0 / s) for t in range(count) for s in range(1, 5)]
    rows += [(s, f"t{t}", "valid", loss) for t in range(count) for s, loss in ((2, 0.7), (4, 0.9))]
    figure = figures.adapter_curves(pd.DataFrame(rows, columns=["step", "task", "split", "loss"]))
    panels = visible_axes(figure)
    assert [axes.get_title() for axes in panels] == [f"t{t}" for t in range(count)]
    kept = next(line for line in panels[-1].get_lines() if line.get_label() == "kept")
    assert (kept.get_xdata()[0], kept.get_ydata()[0]) == (2, 0.7)


@pytest.mark.parametrize("count", [2, 5, 28])
def test_routing_heatmaps_show_the_shares(count):
    tasks = list(TASKS)[:count]
    figure = figures.routing_heatmaps(routing(tasks))
    by_task, by_layer, by_module, bar = figure.axes
    matrix = by_task.collections[0].get_array().reshape(count, count)
    assert matrix.diagonal().tolist() == pytest.approx([0.6] * count)
    assert matrix.sum(axis=1).tolist() == pytest.approx([1.0] * count)
    assert by_layer.collections[0].get_array().reshape(count, 3)[0].tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert [label.get_text() for label in by_module.get_yticklabels()] == MODULES
    assert by_task.collections[0].get_cmap().name == "cividis"
    assert bar.get_ylabel() == "share of routing weight"


def test_routing_without_adapters_of_the_tasks_names_has_one_panel():
    rows = routing(["a", "b"]).assign(adapter=lambda frame: "adapter of " + frame["adapter"])
    assert len(figures.routing_heatmaps(rows).axes) == 2


TOKENS = ["[INST] ", "a <b>&", ' "quoted"', " costs $5 and $6", "\n\n", " [/INST]", "\n", "1", ". yes"]
DOMINANT = [0, 0, 1, 1, 1, 1, 0, 1, 1]
WEIGHT = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.5, 0.9, 1.0]
ADAPTERS = ["first <task>", "second"]
WRITTEN = [False] * 3 + [True] + [False] * 3 + [True] * 2


class Spans(HTMLParser):
    """The title, style and text of every span that has a title."""

    def __init__(self):
        super().__init__()
        self.spans, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        self.current = [attributes["title"], attributes["style"], ""] if "title" in attributes else None
        if self.current:
            self.spans.append(self.current)

    def handle_data(self, data):
        if getattr(self, "current", None):
            self.current[2] += data

    def handle_endtag(self, tag):
        self.current = None


def test_figure4_html_is_self_contained_and_escaped():
    text = figures.figure4_html(TOKENS, DOMINANT, WEIGHT, ADAPTERS, written=WRITTEN, title="A & B")
    parser = Spans()
    parser.feed(text)
    assert parser.tags == {"div", "p", "b", "span"}
    assert [span[2].replace("⏎", "") for span in parser.spans] == TOKENS
    assert [span[0] for span in parser.spans] == [f"{ADAPTERS[d]}: {w:.2f}" for d, w in zip(DOMINANT, WEIGHT)]
    assert ["border-bottom" in span[1] for span in parser.spans] == WRITTEN
    assert "<task>" not in text and html.escape("first <task>") in text and "A &amp; B" in text
    assert not re.search(r"https?:|<script|<link|src=", text)


def test_tokens_are_darker_where_the_weight_is_higher():
    def lightness(weight):
        return sum(to_rgb(token_shade(PALETTE[0], weight, 4)))

    shades = [lightness(weight) for weight in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert shades[0] == shades[1] > shades[2] > shades[3] > shades[4]
    assert token_shade(PALETTE[0], 1.0, 4) == PALETTE[0] == token_shade(PALETTE[0], 1.0, 1)


def test_figure4_picture_holds_every_character():
    figure = figures.figure4_tokens(TOKENS, DOMINANT, WEIGHT, ADAPTERS, written=WRITTEN, columns=20)
    [axes] = figure.axes
    shown = "".join(text.get_text() for text in axes.texts)
    assert shown.replace("⏎", "") == "".join(TOKENS).replace("\n", "")
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert all(patch.get_x() + patch.get_width() <= 20 for patch in patches)
    assert sum(patch.get_width() for patch in patches) == len(shown)
    assert len(axes.get_lines()) == 3  # the underlined tokens, none of them cut by the end of a line
    frequent = sorted(range(len(ADAPTERS)), key=lambda n: -DOMINANT.count(n))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [ADAPTERS[n] for n in frequent]


def test_figure4_wants_an_adapter_and_a_weight_for_every_token():
    with pytest.raises(ValueError, match="9 tokens, 9 adapters, 1 weights"):
        figures.figure4_tokens(TOKENS, DOMINANT, [1.0], ADAPTERS)
    with pytest.raises(ValueError, match="index into the 1 adapters"):
        figures.figure4_html(TOKENS, DOMINANT, WEIGHT, ADAPTERS[:1])
    with pytest.raises(ValueError, match="each of the 9 tokens who wrote it, not of 1"):
        figures.figure4_html(TOKENS, DOMINANT, WEIGHT, ADAPTERS, written=[True])


def test_figure1_names_the_seven_linear_layers_and_the_adapters():
    shown = words(figures.figure1_framework(["winowhy", "gsm8k"]))
    assert all(name in shown for name in [*MODULES, "attention", "RMSNorm", "winowhy", "gsm8k", "gate G"])


def test_figure2_shows_the_tokens_own_numbers():
    figure = figures.figure2_module(["a", "b", "c"], [1.25, -0.5, 0.75], [0.62, 0.0, 0.38])
    shown = words(figure)
    for part in ("+1.25", "-0.50", "w = 0.62", "w = 0.38", "not chosen", "top-2", "a:  s B (A x)"):
        assert part in shown
    assert shown.count("not chosen") == 1
    with pytest.raises(ValueError, match="one logit and one weight for every adapter"):
        figures.figure2_module(["a"], [], [1.0])


def test_28_adapters_have_28_colours_and_readable_text():
    colors = adapter_colors(list(TASKS))
    assert len(set(colors.values())) == 28
    for color in colors.values():
        light, dark = (sum(to_rgb(c)) for c in (color, readable_on(color)))
        assert abs(light - dark) > 0.8


def test_methods_differ_in_more_than_colour():
    shapes = [(marker, line) for _, marker, line in METHOD_STYLES.values()]
    assert len(set(shapes)) == len({color for color, _, _ in METHOD_STYLES.values()}) == len(METHOD_STYLES)


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="gate_training.csv lacks the columns lm_loss"):
        figures.gate_curves(pd.DataFrame({"step": [1], "loss": [1.0], "gate_loss": [1.0], "gate_accuracy": [1.0]}))
    with pytest.raises(ValueError, match="no metric 'bleu'; it has accuracy"):
        figures.figure3_radar(independent("ab"), "bleu")


def test_no_figure_stays_open():
    figures.figure3_dots(independent("ab"))
    figures.figure1_framework()
    assert plt.get_fignums() == []
