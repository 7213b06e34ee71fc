"""The pictures of a profile: matplotlib figures, and each as SVG for light and dark pages.

    svg(draw_memory(document), "memory")

Text stays text and colours are the page's own variables (`THEME`), so that one drawing
serves both. What a picture draws carries its place in the document as its gid: the line
`memory.footprint` is `document["memory"]["footprint"]` over `memory.seconds`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .owners import OWNERS
from .profiler import PARTS

WIDTH = 7.6  # inches; drawn at 72 to the inch
# What is drawn with, and the page's variable that it becomes: (light, dark).
THEME: dict[str, tuple[str, str, str]] = {
    "#010101": ("ink", "#1d2329", "#e6e9ec"),
    "#020202": ("faint", "#6b747d", "#98a1aa"),
    "#030303": ("rule", "#d9dde1", "#343b42"),
    "#040404": ("paper", "#ffffff", "#171b1f"),
    "#110000": ("blue", "#2f6fb7", "#6aa5e8"),
    "#120000": ("orange", "#d9822b", "#f0a35a"),
    "#130000": ("green", "#3b8f5a", "#6cc28c"),
    "#140000": ("red", "#c2413b", "#f07a72"),
    "#150000": ("purple", "#7d5ba6", "#b595dd"),
    "#160000": ("teal", "#2a9d9a", "#62cfca"),
    "#170000": ("grey", "#a3abb3", "#6f7881"),
    "#180000": ("yellow", "#c9a227", "#e3c454"),
}
_NAMED = {name: drawn for drawn, (name, _, _) in THEME.items()}
OWNER_COLOURS = dict(
    zip(OWNERS, ("grey", "blue", "purple", "green", "orange", "red", "yellow"), strict=True)
)
OWNER_NAMES = {
    "runtime": "runtime",
    "trunk": "trunk",
    "head": "MTP head",
    "pool": "expert pool",
    "kv": "KV cache",
    "workspace": "workspace",
    "free": "free buffers",
}
PART_COLOURS = dict(zip(PARTS, ("blue", "red", "grey", "purple", "teal", "yellow"), strict=True))
PART_NAMES = {
    "compute": "compute",
    "waiting": "waiting for reads",
    "host": "host",
    "drafting": "drafting",
    "verifying": "verifying",
    "rehearsing": "rehearsing",
}
HEAT = LinearSegmentedColormap.from_list(
    "heat", ("#2b4257", "#2f6fb7", "#2a9d9a", "#c9a227", "#f3e3a1")
)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "streamer",
    "path.simplify": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _NAMED["faint"],
    "axes.facecolor": "none",
    "axes.labelcolor": _NAMED["faint"],
    "axes.titlecolor": _NAMED["ink"],
    "text.color": _NAMED["ink"],
    "xtick.color": _NAMED["faint"],
    "ytick.color": _NAMED["faint"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _NAMED["rule"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
}


def colour(name: str) -> str:
    """What to draw with for the page's variable `name`."""
    return _NAMED[name]


def svg(figure: Figure, name: str) -> str:
    """An <svg> element to put into a page; ids begin with `name`."""
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    for drawn, (variable, _, _) in THEME.items():
        text = text.replace(drawn, f"var(--{variable})")
    return text


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    def styled(document: dict[str, Any]) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(document)

    styled.__doc__, styled.__name__ = draw.__doc__, draw.__name__
    return styled


@_styled
def draw_memory(document: dict[str, Any]) -> Figure:
    """Owners stacked over time, the footprint, the budget; beneath, the page cache."""
    memory = document["memory"]
    seconds = memory["seconds"]
    scale, unit = size_unit(max(memory["limit"], memory["largest_footprint"]))
    cached = memory["page_cache"] is not None
    figure = Figure(figsize=(WIDTH, 4.3 if cached else 3.3), layout="constrained")
    if cached:
        axes, below = figure.subplots(2, 1, height_ratios=(3.6, 1), sharex=True)
    else:
        axes, below = figure.subplots(), None
    names = [n for n in OWNERS if max(memory["owners"][n]) > 0]
    stacked = np.cumsum([memory["owners"][n] for n in names], axis=0) / scale
    under = np.zeros(len(seconds))
    for name, top in zip(names, stacked, strict=True):
        axes.fill_between(
            seconds, under, top, color=colour(OWNER_COLOURS[name]), lw=0,
            label=OWNER_NAMES[name], gid=f"memory.owners.{name}",
        )  # fmt: skip
        under = top
    axes.plot(
        seconds, np.array(memory["footprint"]) / scale, color=colour("ink"), lw=1.1,
        label="measured", gid="memory.footprint",
    )  # fmt: skip
    axes.axhline(
        memory["limit"] / scale, color=colour("red"), lw=1.3, ls=(0, (5, 3)), label="budget",
        gid="memory.limit",
    )  # fmt: skip
    _moment(axes, memory["first_token_seconds"])
    axes.set(ylabel=unit, ylim=(0, 1.08 * max(memory["limit"], max(memory["footprint"])) / scale))
    axes.set_xlim(0, max(seconds))
    axes.set_title("Memory of the process, by owner")
    _legend_outside(axes, reverse=True)
    if below is not None:
        scale, unit = size_unit(max(1, memory["largest_page_cache"]))
        below.fill_between(
            seconds, 0, np.array(memory["page_cache"]) / scale, color=colour("teal"), lw=0,
            gid="memory.page_cache",
        )  # fmt: skip
        below.set(ylabel=unit, ylim=(0, None))
        below.yaxis.set_major_locator(MaxNLocator(3))
        below.set_title("Page cache of the checkpoint's files (outside the process)")
    (below or axes).set_xlabel("seconds")
    return figure


def _moment(axes: Axes, seconds: float) -> None:
    axes.axvline(seconds, color=colour("faint"), lw=0.9, ls=":", label="first token")


@_styled
def draw_steps(document: dict[str, Any]) -> Figure:
    """What each generated step spent, stacked."""
    timeline = document["timeline"]
    edges = np.array(timeline["edges"])
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    under = np.zeros(len(edges) - 1)
    for part in PARTS:
        values = 1e3 * np.array(timeline[part])
        if not values.any():
            continue
        axes.stairs(
            under + values, edges, baseline=under, fill=True, color=colour(PART_COLOURS[part]),
            label=PART_NAMES[part], gid=f"timeline.{part}",
        )  # fmt: skip
        under = under + values
    top = 1e3 * timeline["shown_up_to_seconds"]
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, top), ylabel="ms", xlabel="generated step")
    per = timeline["steps_per_bar"]
    axes.set_title("Time of each step" if per == 1 else f"Time of a step, mean of {per} a bar")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_outside(axes, reverse=True)
    return figure


@_styled
def draw_experts(document: dict[str, Any]) -> Figure:
    """Use, residency and misses, layer by expert."""
    experts = document["experts"]
    panels = (
        ("use", "Use: times chosen"),
        ("residency", "Residency: share of steps in memory"),
        ("misses", "Misses: times read"),
    )
    layers = len(experts["use"])
    height = min(2.6, max(0.75, 0.085 * layers))
    figure = Figure(figsize=(WIDTH, 3 * (height + 0.5)), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(3, 1, sharex=True), panels, strict=True):
        table = grid(experts[name])
        shown = axes.imshow(
            table, cmap=HEAT, aspect="auto", interpolation="none", origin="lower", vmin=0,
            vmax=1 if name == "residency" else max(1, np.nanmax(table)), gid=f"experts.{name}",
        )  # fmt: skip
        axes.grid(False)
        axes.set_title(title)
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        bar = figure.colorbar(shown, ax=axes, pad=0.01, aspect=9)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(MaxNLocator(3, integer=name != "residency"))
        if name == "residency":
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    axes.set_xlabel("expert")
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    return figure


def grid(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of unequal lengths as one table, nothing (NaN) past their ends."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


@_styled
def draw_pool(document: dict[str, Any]) -> Figure:
    """Hit rate over the pool's size, and the speed to expect over the budget."""
    pool, run = document["pool"], document["run"]
    here = pool["here"]
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    share = 100 * np.array(pool["share"])
    curves = (("belady", "Belady (bound)", "green"), ("own", "LRFU (ours)", "blue"))
    for name, label, style in (*curves, ("lru", "LRU", "grey")):
        left.plot(
            share, 100 * np.array(pool[name]), color=colour(style), marker="o", ms=3.5, lw=1.6,
            label=label, gid=f"pool.{name}",
        )  # fmt: skip
    _here(left, share[here], 100 * pool["own"][here])
    left.set(xlabel="experts in memory, %", ylabel="%", ylim=(0, 103), xlim=(0, 103))
    left.set_title("Hit rate of this text")
    left.legend(loc="lower right")
    scale, unit = size_unit(max(pool["budget_bytes"]))
    budgets = np.array(pool["budget_bytes"]) / scale
    speeds = np.array(pool["tokens_per_second"])
    right.plot(
        budgets[:-1],
        speeds[:-1],
        color=colour("blue"),
        marker="o",
        ms=3.5,
        lw=1.6,
        label="expected",
        gid="pool.tokens_per_second",
    )
    right.plot(
        budgets[-1:],
        speeds[-1:],
        color=colour("blue"),
        marker="o",
        mfc="none",
        ms=6,
        lw=0,
        label="all in memory",
        gid="pool.tokens_per_second.-1",
    )
    _here(right, budgets[here], run["tokens_per_second"])
    right.set(xlabel=f"memory budget, {unit}", ylabel="tokens/s", ylim=(0, None))
    right.set_title("Speed to expect")
    right.legend(loc="best")  # where the curves leave room: they may be flat or steep
    return figure


def _here(axes: Axes, x: float, y: float) -> None:
    axes.plot(
        [x], [y], color=colour("red"), marker="D", ms=6.5, lw=0, label="this run", zorder=4
    )  # fmt: skip


@_styled
def draw_drafts(document: dict[str, Any]) -> Figure:
    """Acceptance by depth."""
    drafts = document["drafts"]
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(
        drafts["depth"], 100 * np.array(drafts["acceptance"]), width=0.55, color=colour("purple")
    )
    for i, bar in enumerate(bars):
        bar.set_gid(f"drafts.acceptance.{i}")
    axes.bar_label(bars, [f"{a:.0%}" for a in drafts["acceptance"]], padding=2)
    axes.set(ylim=(0, 112), ylabel="% accepted", xlabel="depth of the draft")
    axes.set_xticks(drafts["depth"])
    axes.set_xlim(0.4, max(4, len(bars)) + 0.6)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_title("Drafts accepted, of those verified at that depth")
    return figure


@_styled
def draw_reads(document: dict[str, Any]) -> Figure:
    """Sizes of reads, and the time that each took."""
    reads = document["reads"]
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.arange(len(reads["size_edges"]))
    left.stairs(
        reads["size_counts"], edges, fill=True, color=colour("teal"), gid="reads.size_counts"
    )
    left.set(ylabel="reads", xlabel="size of a read", xlim=(edges[0], edges[-1]))
    every = max(1, -(-len(edges) // 4))
    left.set_xticks(edges[::every], [short_size(e) for e in reads["size_edges"][::every]])
    left.set_title("Reads by size")
    right.stairs(
        reads["took_counts"], 1e3 * np.array(reads["took_edges"]), fill=True,
        color=colour("orange"), gid="reads.took_counts",
    )  # fmt: skip
    highest = 1.25 * max(reads["took_counts"])  # room for the labels
    right.set(xscale="log", xlabel="ms under way", ylabel="reads", ylim=(0, highest))
    right.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    right.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    for value, label in zip(reads["took_quantiles"], ("median", "90%", "99%"), strict=True):
        right.axvline(1e3 * value, color=colour("ink"), lw=0.9, ls=":")
        right.annotate(
            label, (1e3 * value, 1), xycoords=("data", "axes fraction"), xytext=(2, -2),
            textcoords="offset points", rotation=90, va="top", fontsize=7.5,
        )  # fmt: skip
    right.set_title("Reads by the time they took")
    return figure


@_styled
def draw_sweep(document: dict[str, Any]) -> Figure:
    """Speed and hit rate over the budget, measured and forecast."""
    sweep = document["sweep"]
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    scale, unit = size_unit(max(sweep["budget_bytes"]))
    budgets = np.array(sweep["budget_bytes"]) / scale
    for axes, name, factor in ((left, "tokens_per_second", 1), (right, "hit_rate", 100)):
        axes.plot(
            budgets, factor * np.array(sweep[f"forecast_{name}"]), color=colour("faint"),
            ls=(0, (4, 2)), marker="s", mfc="none", ms=5, lw=1.4, label="forecast",
            gid=f"sweep.forecast_{name}",
        )  # fmt: skip
        axes.plot(
            budgets, factor * np.array(sweep[name]), color=colour("blue"), marker="o", ms=4.5,
            lw=1.6, label="measured", gid=f"sweep.{name}",
        )  # fmt: skip
        axes.set_xlabel(f"memory budget, {unit}")
        axes.legend(loc="best")
    left.set(ylabel="tokens/s", ylim=(0, None))
    left.set_title("Speed")
    right.set(ylabel="%", ylim=(0, 103))
    right.set_title("Hit rate")
    return figure


def size_unit(nbytes: float) -> tuple[int, str]:
    """Bytes of the unit that suits a size, and its name; in units of 1024, as `format_size`."""
    for name, scale in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if nbytes >= 1.5 * scale:
            return scale, name
    return 1, "bytes"


def short_size(nbytes: float) -> str:
    """'256 kB'."""
    for name, scale in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:g} {name}"
    return f"{nbytes:g} B"


def _legend_outside(axes: Axes, *, reverse: bool) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.03), reverse=reverse, handlelength=1.3)
