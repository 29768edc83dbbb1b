"""How all figures look: colours that colour-blind readers can tell apart, markers beside colours, legends outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

PALETTE = sns.color_palette("colorblind").as_hex()
BLUE, ORANGE, GREEN, VERMILION, PINK, BROWN, ROSE, GREY, YELLOW, SKY = PALETTE
INK, PALE = "#333333", "#f2f2f2"

# Colour, marker, line style of a method: each tells it apart without the other two.
METHOD_STYLES = {
    "base": (GREY, "X", ":"),
    "peft": ("#000000", "D", "--"),
    "meteora_top1": (SKY, "^", "-"),
    "meteora_top2": (BLUE, "o", "-"),
    "lora_f": (BROWN, "v", "-."),
    "lora_b": (ORANGE, "s", "-."),
    "linear": (PINK, "P", ":"),
    "ties": (YELLOW, "p", ":"),
    "dare": (ROSE, "h", ":"),
    "arrow": (VERMILION, ">", "--"),
    "xlora": (GREEN, "<", "--"),
    "lorahub": ("#7b4173", "d", "--"),
    "chance": (INK, "|", ":"),
    "majority": ("#9e9ac8", "2", "--"),
}
BACKEND_STYLES = {
    "loop": (VERMILION, "s", ":"),
    "bmm": (ORANGE, "^", "-."),
    "dense": (BLUE, "o", "-"),
    "triton": (PINK, "D", "-"),
    "auto": (GREEN, "P", ":"),
    "single_lora": ("#000000", "v", "--"),
    "base": (GREY, "X", "--"),
}
BACKEND_LABELS = {
    "loop": "loop (per token's adapter)",
    "bmm": "bmm (gathered weights)",
    "dense": "dense (all adapters, masked)",
    "triton": "triton (fused kernels)",
    "auto": "auto (triton on a GPU, else dense)",
    "single_lora": "single_lora (one LoRA, by torch)",
    "base": "base (the frozen layer alone)",
}
_RC = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with the study's style, and leave no open figure behind: the caller holds the only reference."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with plt.rc_context(_RC):
            figure = draw(*args, **kwargs)
        plt.close(figure)
        return figure

    return wrapper


def adapter_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each adapter: the palette's ten, then its darker and its paler ones; up to five without red."""
    first = [BLUE, ORANGE, GREEN, PINK, GREY, VERMILION, YELLOW, BROWN, SKY, ROSE]
    shades = [first, [mix(c, "#000000", 0.4) for c in first], [mix(c, "#ffffff", 0.5) for c in first]]
    colors = [color for shade in shades for color in shade]
    return {name: colors[n % len(colors)] for n, name in enumerate(names)}


def mix(color: str, other: str, share: float) -> str:
    """``color`` with ``share`` (0..1) of ``other`` in it, as a hex colour."""
    return to_hex([(1 - share) * a + share * b for a, b in zip(to_rgb(color), to_rgb(other))])


def readable_on(color: str) -> str:
    """Black or white, whichever contrasts more with ``color`` (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def legend_below(figure: Figure, axes: Axes, *, columns: int = 4) -> None:
    """One legend for the whole figure under its axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))


def style_of(styles: dict[str, tuple[str, str, str]], name: str) -> tuple[str, str, str]:
    """Colour, marker and line style of a method or backend; black dots for one without a style of its own."""
    return styles.get(name, (INK, ".", "-"))
