"""Figures 1 and 2: where MeteoRA sits in a decoder block, and what happens inside one of its modules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from meteora.study.figures_style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PALE,
    PINK,
    SKY,
    YELLOW,
    adapter_colors,
    mix,
    readable_on,
    styled,
)

_FROZEN, _OURS = "#dddddd", mix(ORANGE, "#ffffff", 0.55)
_GATE = mix(BLUE, "#ffffff", 0.6)


@styled
def figure1_framework(adapters: Sequence[str] = ("task 1", "task 2", "task 3", "...")) -> Figure:
    """Figure 1: a decoder block whose seven linear layers are MeteoRA modules, and one such module beside it.

    Args:
        adapters: names to write on the module's adapters, at most about eight.
    """
    figure = plt.figure(figsize=(9.0, 6.6))
    axes = _canvas(figure, 18, 13.2)
    axes.add_patch(FancyBboxPatch((0.5, 1.2), 9.2, 10.8, boxstyle="round,pad=0.1", facecolor="#fafafa", edgecolor=INK))
    axes.text(9.6, 11.75, "× layers", ha="right", fontsize=9, style="italic")
    stream = 1.2  # x of the residual stream
    _arrow(axes, (stream, 0.3), (stream, 12.9))
    axes.text(stream + 0.25, 0.35, "token's hidden state", fontsize=8, va="center")
    _half(axes, stream, 1.8, ("q_proj", "k_proj", "v_proj"), "attention", "o_proj")
    _half(axes, stream, 7.0, ("gate_proj", "up_proj"), "SiLU(gate) · up", "down_proj")
    _module_beside(axes, adapters)
    for n, (face, text) in enumerate(
        ((_OURS, "linear layer with adapters and gate"), (_GATE, "trained"), (_FROZEN, "frozen, as in the base model"))
    ):
        _box(axes, 11.0, 1.9 - 0.65 * n, 0.7, 0.5, "", face)
        axes.text(11.9, 2.15 - 0.65 * n, text, va="center", fontsize=8.5)
    return figure


def _half(axes: Axes, stream: float, bottom: float, inputs: Sequence[str], between: str, output: str) -> None:
    """One half of a block: normalise, several linear layers, what combines them, one linear layer, add."""
    left, width = 2.4, 6.8
    each = (width - 0.2 * (len(inputs) - 1)) / len(inputs)
    middle = left + width / 2
    axes.plot([stream, middle], [bottom, bottom], color=INK, linewidth=1.2)
    _arrow(axes, (middle, bottom), (middle, bottom + 0.3))
    _box(axes, left, bottom + 0.3, width, 0.55, "RMSNorm", _FROZEN)
    for n, name in enumerate(inputs):
        x = left + n * (each + 0.2)
        _arrow(axes, (x + each / 2, bottom + 0.85), (x + each / 2, bottom + 1.2))
        _box(axes, x, bottom + 1.2, each, 0.7, name, _OURS)
        _arrow(axes, (x + each / 2, bottom + 1.9), (x + each / 2, bottom + 2.25))
    _box(axes, left, bottom + 2.25, width, 0.55, between, _FROZEN)
    _arrow(axes, (middle, bottom + 2.8), (middle, bottom + 3.1))
    _box(axes, left, bottom + 3.1, width, 0.7, output, _OURS)
    axes.plot([middle, middle], [bottom + 3.8, bottom + 4.3], color=INK, linewidth=1.2)
    _arrow(axes, (middle, bottom + 4.3), (stream + 0.24, bottom + 4.3))
    axes.plot(stream, bottom + 4.3, marker="o", markersize=13, markerfacecolor="white", markeredgecolor=INK)
    axes.plot(stream, bottom + 4.3, marker="+", markersize=8, color=INK)


def _module_beside(axes: Axes, adapters: Sequence[str]) -> None:
    axes.plot([9.2, 10.9], [5.6, 9.9], color=ORANGE, linewidth=0.9, linestyle="--")
    axes.plot([9.2, 10.9], [4.9, 3.1], color=ORANGE, linewidth=0.9, linestyle="--")
    frame = {"boxstyle": "round,pad=0.1", "facecolor": "#fffaf2", "edgecolor": ORANGE, "linewidth": 1.4}
    axes.add_patch(FancyBboxPatch((11.0, 3.1), 6.5, 6.8, **frame))
    axes.text(14.25, 9.55, "a MeteoRA module", ha="center", fontsize=10, weight="bold", va="center")
    _box(axes, 11.2, 5.2, 1.5, 2.4, "W\n(frozen)", _FROZEN)
    _box(axes, 12.95, 5.2, 1.35, 2.4, "gate G\n(trained)", _GATE, 8)
    _arrow(axes, (14.3, 6.4), (15.05, 6.4))
    axes.text(14.68, 6.5, "top-k", ha="center", va="bottom", fontsize=7.5)
    height = 2.4 / len(adapters)
    # Blue is what is trained here, and orange what has adapters.
    for n, (name, color) in enumerate(zip(adapters, itertools.cycle((GREEN, PINK, YELLOW, SKY)))):
        _box(axes, 15.1, 7.6 - (n + 1) * height, 2.2, height - 0.08, name, mix(color, "#ffffff", 0.45), 8)
    axes.text(16.2, 7.78, "LoRAs (frozen)", ha="center", fontsize=8)
    for x in (11.95, 13.62, 16.2):
        axes.plot([x, x], [4.1, 5.2], color=INK, linewidth=1.1)
    axes.plot([11.95, 16.2], [4.1, 4.1], color=INK, linewidth=1.1)
    _arrow(axes, (14.25, 3.4), (14.25, 4.1), head=False)
    axes.text(14.45, 3.55, "x", fontsize=10, style="italic")
    axes.plot([11.95, 11.95, 16.2, 16.2], [7.6, 8.4, 8.4, 8.05], color=INK, linewidth=1.1)
    _arrow(axes, (14.25, 8.4), (14.25, 9.2))
    axes.text(14.5, 8.75, "y = W x + Σ w s B A x", fontsize=8.5, style="italic")


@styled
def figure2_module(names: Sequence[str], logits: Sequence[float], weights: Sequence[float]) -> Figure:
    """Figure 2: inside a MeteoRA module, for one token, with that token's own numbers.

    Args:
        names: the adapters, in the order of the gate's rows.
        logits: the gate's logit of each.
        weights: the weight of each after top-k and softmax; 0 for those that were not chosen.
    """
    if not len(names) == len(logits) == len(weights) or not names:
        raise ValueError("give one logit and one weight for every adapter, and at least one adapter.")
    chosen = sum(weight > 0 for weight in weights)
    pitch = 1.15
    tall = max(4, len(names)) * pitch
    figure = plt.figure(figsize=(9.4, 1.5 + 0.55 * tall))
    axes = _canvas(figure, 20, 2.0 + tall)
    top = tall + 0.6
    middle = top - len(names) * pitch / 2
    axes.text(0.35, middle, "x", fontsize=14, style="italic", va="center", ha="center")
    axes.text(0.35, middle - 0.75, "one\ntoken", fontsize=7.5, va="center", ha="center")
    _arrow(axes, (0.7, middle), (1.6, middle))
    _box(axes, 1.6, middle - 1.0, 2.0, 2.0, "gate\nG x\n(trained)", _GATE)
    _arrow(axes, (3.6, middle), (4.4, middle))
    axes.text(5.55, top + 0.35, "logits", ha="center", fontsize=9)
    axes.text(8.35, top + 0.35, f"top-{chosen}, softmax", ha="center", fontsize=9)
    axes.text(11.9, top + 0.35, "LoRAs (frozen)", ha="center", fontsize=9)
    for n, (name, color) in enumerate(adapter_colors(names).items()):
        _lane(axes, name, color, logits[n], weights[n], top - (n + 0.5) * pitch, middle)
    axes.plot(16.4, middle, marker="o", markersize=17, markerfacecolor="white", markeredgecolor=INK)
    axes.text(16.4, middle, "Σ", ha="center", va="center", fontsize=11)
    _arrow(axes, (16.7, middle), (18.0, middle))
    axes.plot(18.3, middle, marker="o", markersize=15, markerfacecolor="white", markeredgecolor=INK)
    axes.plot(18.3, middle, marker="+", markersize=9, color=INK)
    _arrow(axes, (18.6, middle), (19.4, middle))
    axes.text(19.65, middle, "y", fontsize=14, style="italic", va="center", ha="center")
    axes.plot([1.1, 1.1, 9.0], [middle, 0.05, 0.05], color=INK, linewidth=1.2)
    _box(axes, 9.0, -0.4, 3.2, 0.9, "base layer W (frozen)", _FROZEN)
    axes.plot([12.2, 18.3], [0.05, 0.05], color=INK, linewidth=1.2)
    _arrow(axes, (18.3, 0.05), (18.3, middle - 0.35))
    return figure


def _lane(axes: Axes, name: str, color: str, logit: float, weight: float, y: float, middle: float) -> None:
    """One adapter's way through the module: its logit, its weight, its B and A."""
    used = weight > 0
    ink = INK if used else "#aaaaaa"
    axes.text(5.55, y, f"{logit:+.2f}", ha="center", va="center", fontsize=9, color=ink)
    axes.plot([6.4, 7.3], [y, y], color=ink, linewidth=0.8, linestyle="-" if used else ":")
    axes.text(8.35, y, f"w = {weight:.2f}" if used else "not chosen", ha="center", va="center", fontsize=9, color=ink)
    face = mix(color, "#ffffff", 0.35) if used else PALE
    _box(axes, 9.6, y - 0.4, 4.6, 0.8, f"{name}:  s B (A x)", face, 9, ink=readable_on(face) if used else "#999999")
    if used:
        axes.plot([14.2, 16.1], [y, middle], color=INK, linewidth=0.6 + 3.0 * weight, solid_capstyle="round")


def _canvas(figure: Figure, width: float, height: float) -> Axes:
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(-0.6, height - 0.6) if height < 13 else (0, height))
    axes.axis("off")
    return axes


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, face: str, size: float = 9, ink: str = INK
) -> None:
    corner, inner = (x + 0.06, y + 0.06), (width - 0.12, height - 0.12)
    style = {"boxstyle": "round,pad=0.06", "facecolor": face, "edgecolor": INK, "linewidth": 0.8}
    axes.add_patch(FancyBboxPatch(corner, *inner, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=ink)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, head: bool = True) -> None:
    style = "-|>" if head else "-"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=9, color=INK, linewidth=1.2, shrinkA=0, shrinkB=0)
    )
