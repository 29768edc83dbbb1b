"""What the gates know of the task: layer by layer, and token by token."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from meteora.study.figures_style import BLUE, GREY, legend_below, styled
from meteora.study.tables import require_columns

LEAST_TEXTS = 20  # that a point of a curve over their tokens stands for


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
        positions: rows ``position,accuracy,tokens``; places that fewer than 5% of the texts reach are left out above.
        adapters: draws the accuracy of guessing among so many.
    """
    require_columns(positions, ("position", "accuracy", "tokens"), "gate_positions.csv")
    figure = plt.figure(figsize=(7.0, 3.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    reached = positions[positions["tokens"] >= 0.05 * positions["tokens"].max()]
    upper.plot(reached["position"], reached["accuracy"], color=BLUE, label="majority of the gates")
    upper.axhline(1 / adapters, color=GREY, linestyle=":", label=f"guessing among {adapters}")
    upper.set(ylabel="accuracy", ylim=(0, 1.02))
    upper.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    lower.fill_between(positions["position"], positions["tokens"], color=GREY, alpha=0.5, linewidth=0)
    lower.set(xlabel="place in the text (tokens)", ylabel="texts", ylim=(0, None))
    return figure


@styled
def switching_curves(switching: pd.DataFrame, *, adapters: int, most: int = 48) -> Figure:
    """How soon behind a junction the gates are at the new task's adapter, in its prompt and in its answer.

    Args:
        switching: rows ``composite,part,distance,own,previous,weight,tokens``.
        adapters: draws the share of guessing among so many.
        most: tokens behind the junction that are shown; fewer where there are few texts so long.
    """
    require_columns(switching, ("composite", "part", "distance", "own", "previous", "tokens"), "switching.csv")
    sizes, parts = sorted(switching["composite"].unique()), list(dict.fromkeys(switching["part"]))
    figure = plt.figure(figsize=(1.0 + 3.7 * len(parts), 3.6), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    colors = sns.color_palette("cividis", len(sizes)).as_hex() if len(sizes) > 1 else [BLUE]
    for axes, part in zip(panels, parts):
        for size, color, marker in zip(sizes, colors, "os^Dv<>"):
            frame = switching[(switching["part"] == part) & (switching["composite"] == size)]
            # what is left of the curve where texts grow few is noise
            longest = frame["tokens"].max()
            least = max(0.1 * longest, min(LEAST_TEXTS, 0.5 * longest))
            frame = frame[(frame["distance"] < most) & (frame["tokens"] >= least)]
            options = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.3}
            axes.plot(frame["distance"] + 1, frame["own"], label=f"own, composite-{size}", **options)
            axes.plot(
                frame["distance"] + 1, frame["previous"], linestyle=":", markerfacecolor="white",
                label=f"previous, composite-{size}", **options,
            )  # fmt: skip
        axes.axhline(1 / adapters, color=GREY, linestyle="--", linewidth=1, label=f"guessing among {adapters}")
        axes.set(title=f"{part} tokens", xlabel=f"token of the {part}", ylim=(-0.02, 1.02))
    panels[0].set_ylabel("share of tokens by dominant adapter")
    legend_below(figure, panels[0], columns=len(sizes) + 1)  # filled column by column: one a size
    return figure
