"""What the gates know of the task: layer by layer, and token by token."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from meteora.study.figures_style import BLUE, GREY, styled
from meteora.study.tables import require_columns


@styled
def gate_accuracy_heatmap(gate_accuracy: pd.DataFrame) -> Figure:
    """Share of tokens whose task each gate recognises, module by layer, for prompts and for responses.

    Args:
        gate_accuracy: rows ``task,part,layer,module,accuracy,tokens``.
    """
    require_columns(gate_accuracy, ("part", "layer", "module", "accuracy", "tokens"), "gate_accuracy.csv")
    modules, parts = list(dict.fromkeys(gate_accuracy["module"])), list(dict.fromkeys(gate_accuracy["part"]))
    layers = gate_accuracy["layer"].nunique()
    figure = plt.figure(figsize=(2.4 + (2.6 + 0.05 * layers) * len(parts), 2.6), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    frame = gate_accuracy.assign(right=gate_accuracy["accuracy"] * gate_accuracy["tokens"])
    for axes, part in zip(panels, parts):
        sums = frame[frame["part"] == part].groupby(["module", "layer"])[["right", "tokens"]].sum()
        matrix = (sums["right"] / sums["tokens"]).unstack("layer").loc[modules]
        sns.heatmap(
            matrix, ax=axes, vmin=0, vmax=1, cmap="cividis", cbar=False, rasterized=True, xticklabels=-(-layers // 8)
        )
        axes.set(title=f"{part} tokens", xlabel="layer", ylabel="")
        axes.grid(visible=False)
        axes.tick_params(axis="both", rotation=0)
    figure.colorbar(panels[0].collections[0], ax=list(panels), label="gate accuracy", pad=0.01)
    return figure


@styled
def accuracy_by_position(positions: pd.DataFrame, *, adapters: int) -> Figure:
    """Share of tokens whose task most gates recognise, by the token's place in the text; how many texts are so long.

    Args:
        positions: rows ``position,accuracy,tokens``.
        adapters: draws the accuracy of guessing among so many.
    """
    require_columns(positions, ("position", "accuracy", "tokens"), "gate_positions.csv")
    figure = plt.figure(figsize=(7.0, 3.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot(positions["position"], positions["accuracy"], color=BLUE, label="majority of the gates")
    upper.axhline(1 / adapters, color=GREY, linestyle=":", label=f"guessing among {adapters}")
    upper.set(ylabel="accuracy", ylim=(0, 1.02))
    upper.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    lower.fill_between(positions["position"], positions["tokens"], color=GREY, alpha=0.5, linewidth=0)
    lower.set(xlabel="place in the text (tokens)", ylabel="texts", ylim=(0, None))
    return figure
