"""Figure 4: a prompt and its answer, each token coloured by its dominant adapter, darker where it weighs more."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from meteora.study.figures_style import adapter_colors, mix, readable_on, styled

_CHARACTER = 0.60205  # width of DejaVu Sans Mono over its size
_SIZE = 9 / _CHARACTER * 72 / 150  # points: at 150 dpi a character is 9 whole pixels wide, or letters would drift
_LEAST = 0.15  # share of an adapter's colour where its weight is no more than everybody's


def token_shade(color: str, weight: float, adapters: int) -> str:
    """The background of a token: paler down to an even weight (1 / adapters), the full colour at weight 1."""
    even = 1 / adapters
    strength = (weight - even) / (1 - even) if adapters > 1 else 1.0
    return mix(color, "#ffffff", (1 - _LEAST) * (1 - min(1.0, max(0.0, strength))))


def figure4_html(
    tokens: Sequence[str],
    dominant: Sequence[int],
    weight: Sequence[float],
    adapters: Sequence[str],
    *,
    written: Sequence[bool] | None = None,
    title: str = "Figure 4",
) -> str:
    """Figure 4 as one self-contained piece of HTML; pointing at a token tells its adapter and weight.

    Args:
        tokens: each token's text, spaces and line breaks included.
        dominant: index of each token's adapter in ``adapters``.
        weight: that adapter's weight, 0..1, averaged over layers.
        written: whether the model wrote a token itself; such tokens are underlined.
    """
    _check(tokens, dominant, weight, adapters, written)
    colors = _colors(dominant, adapters)
    spans = []
    for n, (token, index, share) in enumerate(zip(tokens, dominant, weight)):
        back = token_shade(colors[index], share, len(adapters))
        style = f"background:{back};color:{readable_on(back)}"
        if written is not None and written[n]:
            style += ";border-bottom:2px solid currentColor"
        hint = html.escape(f"{adapters[index]}: {share:.2f}", quote=True)
        text = html.escape(token.replace("\n", "⏎\n"))
        spans.append(f'<span style="{style}" title="{hint}">{text}</span>')
    keys = [
        f'<span style="background:{colors[n]};color:{readable_on(colors[n])};padding:1px 6px;margin-right:6px;'
        f'white-space:nowrap">{html.escape(adapters[n])}</span>'
        for n in colors
    ]
    note = "The darker, the higher the weight."
    if written is not None:
        note += " Underlined: written by the model."
    return (
        '<div style="font-family:sans-serif;font-size:13px;max-width:980px;background:#fff;color:#000;padding:8px">'
        f'<p style="margin:4px 0"><b>{html.escape(title)}</b></p>'
        f'<p style="margin:4px 0;line-height:2">{" ".join(keys)}</p><p style="margin:4px 0;color:#555">{note}</p>'
        '<div style="font-family:monospace;font-size:12px;line-height:1.7;white-space:pre-wrap;overflow-wrap:anywhere">'
        f"{''.join(spans)}</div></div>\n"
    )


@styled
def figure4_tokens(
    tokens: Sequence[str],
    dominant: Sequence[int],
    weight: Sequence[float],
    adapters: Sequence[str],
    *,
    written: Sequence[bool] | None = None,
    columns: int = 110,
) -> Figure:
    """Figure 4 as a picture, in lines of ``columns`` characters; arguments as of :func:`figure4_html`."""
    _check(tokens, dominant, weight, adapters, written)
    colors = _colors(dominant, adapters)
    places, lines = _places(tokens, columns)
    width, height = columns * _CHARACTER * _SIZE / 72, lines * 1.55 * _SIZE / 72  # inches
    rows = -(-len(colors) // 3)
    top, margin = 0.25 + 0.2 * rows, 0.15  # inches, for the legend and around the text
    figure = plt.figure(figsize=(width + 2 * margin, height + top + 2 * margin))
    full_width, full_height = figure.get_size_inches()
    axes = figure.add_axes((margin / full_width, margin / full_height, width / full_width, height / full_height))
    axes.set(xlim=(0, columns), ylim=(lines, 0))
    axes.axis("off")
    for n, piece, line, start in places:
        back = token_shade(colors[dominant[n]], weight[n], len(adapters))
        _draw_piece(axes, piece, line, start, back, written is not None and bool(written[n]))
    note = "dominant adapter; darker: higher weight"
    if written is not None:
        note += "; underlined: written by the model"
    handles = [Patch(color=colors[n], label=adapters[n]) for n in colors]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(margin / full_width, 1.0), ncols=3, fontsize=8,
        title=note, title_fontsize=8, alignment="left", borderaxespad=0.3,
    )  # fmt: skip
    return figure


def _colors(dominant: Sequence[int], adapters: Sequence[str]) -> dict[int, str]:
    """A colour for each adapter that is some token's, the most frequent first, as the first hues differ most.

    Shades of one hue are left to weights as long as hues suffice.
    """
    used = [n for n, _ in Counter(dominant).most_common()]
    return dict(zip(used, adapter_colors([adapters[n] for n in used]).values(), strict=True))


def _draw_piece(axes: Axes, piece: str, line: int, start: int, back: str, underline: bool) -> None:
    axes.add_patch(Rectangle((start, line + 0.04), len(piece), 0.92, facecolor=back, edgecolor="white", linewidth=0.4))
    # parse_math off: a dollar sign in a task's text is a dollar sign.
    axes.text(
        start, line + 0.5, piece, family="DejaVu Sans Mono", fontsize=_SIZE, color=readable_on(back), va="center",
        parse_math=False,
    )  # fmt: skip
    if underline:
        ends = [start, start + len(piece)]
        axes.plot(ends, [line + 0.93] * 2, color=readable_on(back), linewidth=1.0, solid_capstyle="butt")


def _places(tokens: Sequence[str], columns: int) -> tuple[list[tuple[int, str, int, int]], int]:
    """Where every token goes: (its index, a piece of its text, line, column), and the number of lines."""
    places, line, column = [], 0, 0
    for n, token in enumerate(tokens):
        for part in token.replace("\t", "    ").splitlines(keepends=True):
            text = part.rstrip("\r\n")
            piece = text + ("⏎" if part != text else "")
            while piece:
                room = columns - column
                # A token moves to the next line whole if it fits there.
                if room == 0 or (len(piece) > room and len(piece) <= columns and column):
                    line, column, room = line + 1, 0, columns
                places.append((n, piece[:room], line, column))
                column += len(piece[:room])
                piece = piece[room:]
            if part != text:
                line, column = line + 1, 0
    return places, line + (column > 0)


def _check(
    tokens: Sequence[str],
    dominant: Sequence[int],
    weight: Sequence[float],
    adapters: Sequence[str],
    written: Sequence[bool] | None,
) -> None:
    if not len(tokens) == len(dominant) == len(weight) or not tokens:
        raise ValueError(
            f"give a dominant adapter and a weight for every token: {len(tokens)} tokens, {len(dominant)} adapters, "
            f"{len(weight)} weights."
        )
    if written is not None and len(written) != len(tokens):
        raise ValueError(f"written must say of each of the {len(tokens)} tokens who wrote it, not of {len(written)}.")
    if not all(0 <= index < len(adapters) for index in dominant):
        raise ValueError(f"a dominant adapter must be an index into the {len(adapters)} adapters.")
