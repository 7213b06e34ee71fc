"""A profile as one page of HTML: pictures, the numbers beside them, and what they say.

    page(document)

The page needs no network and no script; light and dark follow the reader's system. Every
number in its text is an element <data value=... data-path=...> whose path leads to that
value in the document, so that the page can be checked against `--json`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from . import figures
from .figures import OWNER_COLOURS, OWNER_NAMES, PART_COLOURS, PART_NAMES, THEME
from .footprint import format_size
from .owners import OWNERS
from .profiler import PARTS

Row = tuple[str, str]  # what, and its number as HTML

FORMS: dict[str, Callable[[Any], str]] = {
    "bytes": lambda v: format_size(round(v)),
    "bandwidth": lambda v: f"{v / 1e9:.2f} GB/s",
    "count": lambda v: f"{v:,.0f}",
    "decimal": lambda v: f"{v:.2f}",
    "ms": lambda v: f"{1e3 * v:.2f} ms" if v >= 1e-4 else f"{1e6 * v:.1f} µs",
    "percent": lambda v: f"{v:.0%}",
    "permille": lambda v: f"{v:.1%}",
    "rate": lambda v: f"{v:.1f} tok/s",
    "seconds": lambda v: f"{v:.2f} s",
    "text": str,
}


def lookup(document: Any, path: str) -> Any:
    """The value at a path such as `memory.owners.pool.0`."""
    return reduce(
        lambda at, k: at[int(k)] if isinstance(at, list) else at[k], path.split("."), document
    )


class Numbers:
    """Writes values of a document as HTML that says where they come from."""

    def __init__(self, document: dict[str, Any]):
        self.document = document

    def __call__(self, path: str, form: str) -> str:
        value = lookup(self.document, path)
        plain = html.escape(json.dumps(value))
        shown = html.escape(FORMS[form](value))
        return f'<data value="{plain}" data-path="{path}" data-form="{form}">{shown}</data>'

    def fill(self, sentence: str) -> str:
        """Replaces {path|form} by that number."""
        return re.sub(r"\{([^|{}]+)\|([a-z]+)\}", lambda m: self(m[1], m[2]), sentence)


def page(document: dict[str, Any]) -> str:
    """The whole file."""
    n = Numbers(document)
    parts = [part(document, n) for part in SECTIONS]
    name = html.escape(document["model"]["name"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<title>Profile of {name}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_css()}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(document, n)}\n{''.join(p for p in parts if p)}\n{_foot(n)}</main>\n"
        "</body>\n</html>\n"
    )


def _head(document: dict[str, Any], n: Numbers) -> str:
    options = document["options"]
    asked = options["memory"] or "what the machine can spare"
    facts = [
        f"--memory {asked}", f"reads by {options['io']}", f"executor {options['executor']}",
        f"MTP {options['mtp']}",
    ]  # fmt: skip
    tiles = [
        ("speed", n("run.tokens_per_second", "rate")),
        ("experts found in memory", n("experts.hit_rate", "percent")),
        ("peak memory", n.fill("{run.peak_bytes|bytes}<small> of {budget.limit|bytes}</small>")),
        ("read for each token", n("summary.bytes_per_token", "bytes")),
        ("first token after", n("run.prompt_seconds", "seconds")),
    ]
    told = n.fill(
        "{run.generated_tokens|count} tokens after a prompt of {run.prompt_tokens|count}; "
        "a checkpoint of {model.bytes|bytes} with {model.experts|count} experts, "
        "{experts.slots|count} of them in memory"
    )
    cells = "".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for what, value in tiles)
    return (
        f"<header><h1>{html.escape(document['model']['name'])}</h1>"
        f"<p class=options>{_literal(', '.join(facts))}</p><p>{told}.</p>"
        f"<dl class=tiles>{cells}</dl></header>"
    )


def _literal(text: str) -> str:
    """Text of the command's own, whose digits are not measurements."""
    return f"<code>{html.escape(text)}</code>"


def _section(title: str, name: str, figure: Any, rows: Sequence[Row], sentence: str) -> str:
    table = "".join(f"<tr><th>{what}</th><td>{value}</td></tr>" for what, value in rows)
    return (
        f'<section id="{name}"><h2>{title}</h2><div class=pair>'
        f'<figure role="img" aria-label="{html.escape(title)}" data-name="{name}">'
        f"{figures.svg(figure, name)}</figure>"
        f"<table>{table}</table></div><p class=says>{sentence}</p></section>\n"
    )


def _swatch(colour: str, text: str) -> str:
    return f'<i style="background:var(--{colour})"></i>{text}'


def _memory(document: dict[str, Any], n: Numbers) -> str:
    held = document["memory"]["largest"]
    planned = document["memory"]["planned"]
    rows = [("", "at the largest <small>(planned)</small>")]
    for name in reversed(OWNERS):
        if not held[name] and not max(document["memory"]["owners"][name]):
            continue
        there = name in planned
        wanted = f" <small>({n(f'memory.planned.{name}', 'bytes')})</small>" if there else ""
        row = n(f"memory.largest.{name}", "bytes") + wanted
        rows.append((_swatch(OWNER_COLOURS[name], OWNER_NAMES[name]), row))
    rows += [
        ("measured", n("memory.largest_footprint", "bytes")),
        ("budget", n("memory.limit", "bytes")),
    ]
    cached = document["memory"]["page_cache"] is not None
    if cached:
        rows.append((_swatch("teal", "page cache"), n("memory.largest_page_cache", "bytes")))
    largest = OWNER_NAMES[max(held, key=lambda name: held[name])]
    sentence = n.fill(
        "The process held {memory.largest_footprint|bytes} at most, "
        "{summary.budget_share|percent} of its budget, and the largest part of it was the "
        f"{largest}. Each owner is measured on its own; together they come within "
        "{memory.worst_error|permille} of the measured footprint at every sample."
    )
    if cached:
        sentence += n.fill(
            " The page cache, of which the checkpoint's files took "
            "{memory.largest_page_cache|bytes}, belongs to the system, which gives it up when "
            "memory is short."
        )
    return _section("Memory", "memory", figures.draw_memory(document), rows, sentence)


def _steps(document: dict[str, Any], n: Numbers) -> str:
    mean = document["summary"]["step"]
    rows = [("", "mean of a step")]
    rows += [
        (_swatch(PART_COLOURS[part], PART_NAMES[part]), n(f"summary.step.{part}", "ms"))
        for part in reversed(PARTS)
        if mean[part]
    ]
    rows += [
        ("together", n("summary.step_seconds", "ms")),
        ("slowest", n("summary.slowest_step", "ms")),
        ("tokens a step", n("summary.tokens_per_step", "decimal")),
    ]
    most = max(PARTS, key=lambda part: mean[part])
    sentence = n.fill(
        f"Most of a step went to {PART_NAMES[most]}: {{summary.step.{most}|ms}} of "
        "{summary.step_seconds|ms}. "
        "Host is the time in which the generating thread ran and computed nothing: looking up and "
        "asking for experts, building the next pass, handing out tokens; waiting for reads is "
        "what a faster disk or a larger pool would save."
    )
    if document["timeline"]["beyond"]:
        sentence += n.fill(" Bars that go beyond the top: {timeline.beyond|count}.")
    return _section(
        "Where each step's time went", "steps", figures.draw_steps(document), rows, sentence
    )


def _experts(document: dict[str, Any], n: Numbers) -> str:
    if not document["experts"]["use"]:
        return ""
    rows = [
        ("experts", n("model.experts", "count")),
        ("slots", n("experts.slots", "count")),
        ("of a layer, chosen a token", n("model.experts_per_token", "count")),
        ("bytes of the largest", n("model.bytes_per_expert", "bytes")),
        ("found in memory", n("experts.hits", "count")),
        ("read", n("experts.missed", "count")),
        ("hit rate", n("experts.hit_rate", "percent")),
        ("never used", n("experts.never_used", "count")),
    ]
    sentence = n.fill(
        "The busiest tenth of the experts served {experts.busiest_tenth|percent} of what the "
        "routers chose, and {experts.never_used|count} of {model.experts|count} were never "
        "chosen. Experts that are chosen often and read often are those that the pool is too "
        "small for. Prompt and generated tokens both count; hits and reads are of distinct "
        "experts of a layer in a pass."
    )
    return _section("Experts", "experts", figures.draw_experts(document), rows, sentence)


def _pool(document: dict[str, Any], n: Numbers) -> str:
    if not document["pool"]:
        return ""
    rows: list[Row] = [("budget", "hit rate, speed")]
    for i in range(len(document["pool"]["slots"])):
        value = f"{n(f'pool.own.{i}', 'percent')}, {n(f'pool.tokens_per_second.{i}', 'rate')}"
        what = n(f"pool.budget_bytes.{i}", "bytes")
        rows.append((f"<b>{what}</b>" if i == document["pool"]["here"] else what, value))
    at = document["pool"]["here"]
    sentence = n.fill(
        "The routers' choices of this run, replayed on pools of other sizes: the runtime's own "
        f"policy found {{pool.own.{at}|percent}} of the experts of generated steps in a pool of "
        f"this run's size, LRU {{pool.lru.{at}|percent}}, and none could have found more than "
        f"{{pool.belady.{at}|percent}} (Belady's, which knows the future). "
        "The speeds rest on those misses and on what this run's steps and waits took; this run "
        "itself made {run.tokens_per_second|rate}."
    )
    return _section("Other budgets", "pool", figures.draw_pool(document), rows, sentence)


def _drafts(document: dict[str, Any], n: Numbers) -> str:
    drafts = document["drafts"]
    if not drafts["depth"]:
        return ""
    rows: list[Row] = [("depth", "accepted of verified")]
    for i in range(len(drafts["depth"])):
        value = f"{n(f'drafts.accepted.{i}', 'count')} of {n(f'drafts.drafted.{i}', 'count')}"
        rows.append((n(f"drafts.depth.{i}", "count"), value))
    rows += [
        ("verify passes", n("drafts.verify_passes", "count")),
        ("tokens from each", n("drafts.tokens_per_pass", "decimal")),
    ]
    sentence = n.fill(
        "Of the first drafts {drafts.acceptance.0|percent} were accepted; a verify pass gave "
        "{drafts.tokens_per_pass|decimal} tokens on average, the one after the drafts included. "
        "A draft counts at its depth when it was verified, and is accepted only where all "
        "before it were."
    )
    return _section("Drafts", "drafts", figures.draw_drafts(document), rows, sentence)


def _reads(document: dict[str, Any], n: Numbers) -> str:
    reads = document["reads"]
    if not reads["count"]:
        return ""
    rows = [
        ("reads", n("reads.count", "count")),
        ("bytes", n("reads.bytes", "bytes")),
        ("median size", n("reads.median_bytes", "bytes")),
        ("median time", n("reads.took_quantiles.0", "ms")),
        (n("reads.quantiles.1", "percent") + " within", n("reads.took_quantiles.1", "ms")),
        (n("reads.quantiles.2", "percent") + " within", n("reads.took_quantiles.2", "ms")),
        ("median wait in queue", n("reads.queued_quantiles.0", "ms")),
        ("under way on average", n("reads.under_way", "decimal")),
        ("queued on average", n("reads.in_queue", "decimal")),
        ("rate of one read", n("reads.one_bytes_per_second", "bandwidth")),
        ("rate over the whole run", n("reads.bytes_per_second", "bandwidth")),
    ]
    sentence = n.fill(
        "Half of the reads took {reads.took_quantiles.0|ms} or less once they were begun, after "
        "{reads.queued_quantiles.0|ms} in the queue. Over the whole run "
        "{reads.under_way|decimal} were under way and {reads.in_queue|decimal} queued at a time. "
        "Neighbouring pieces are read at once and large "
        "ones are cut, so a read is seldom one expert."
    )
    return _section("Reads", "reads", figures.draw_reads(document), rows, sentence)


def _sweep(document: dict[str, Any], n: Numbers) -> str:
    sweep = document.get("sweep")
    if not sweep:
        return ""
    rows: list[Row] = [("budget", "measured <small>(forecast)</small>")]
    for i in range(len(sweep["budget_bytes"])):
        value = (
            f"{n(f'sweep.tokens_per_second.{i}', 'rate')} "
            f"<small>({n(f'sweep.forecast_tokens_per_second.{i}', 'rate')})</small><br>"
            f"{n(f'sweep.hit_rate.{i}', 'percent')} "
            f"<small>({n(f'sweep.forecast_hit_rate.{i}', 'percent')})</small>"
        )
        rows.append((n(f"sweep.budget_bytes.{i}", "bytes"), value))
    source = sweep["source"]
    sentence = n.fill(
        "Each budget was run in a process of its own. The forecasts come from the run in "
        f"{{sweep.budget_bytes.{source}|bytes}} alone: its routers replayed on the other pools, "
        "with the times of its steps and waits. The worst of the speeds is "
        "{sweep.worst_error|percent} off what was measured."
    )
    return _section("Budgets, measured", "sweep", figures.draw_sweep(document), rows, sentence)


SECTIONS = (_memory, _steps, _experts, _pool, _sweep, _drafts, _reads)


def _foot(n: Numbers) -> str:
    machine = n.document["machine"]
    versions = ", ".join(
        f"{name} {v}" for name, v in n.document["versions"].items() if name != "kernel"
    )
    told = f"{machine['cpu']}, {machine['system']}, {machine['backend']}; {versions}"
    return (
        f"<footer><p>{n('machine.cores', 'count')} cores, {n('machine.memory_bytes', 'bytes')} of "
        f"memory; {_literal(told)}</p></footer>\n"
    )


def _css() -> str:
    light = ";".join(f"--{name}:{value}" for name, value, _ in THEME.values())
    dark = ";".join(f"--{name}:{value}" for name, _, value in THEME.values())
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}" + _RULES


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;margin:0;line-height:1.2}
h2{font-size:18px;margin:0 0 10px}
header p{margin:4px 0}
code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;
color:var(--faint)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;
margin:18px 0 0}
.tiles div{border:1px solid var(--rule);border-radius:8px;padding:10px 14px}
.tiles dt{color:var(--faint);font-size:13px}
.tiles dd{margin:0;font-size:21px;font-weight:600;white-space:nowrap}
small{color:var(--faint);font-size:13px;font-weight:400}
section{border-top:1px solid var(--rule);margin-top:30px;padding-top:20px}
.pair{display:grid;grid-template-columns:minmax(0,1fr) 290px;gap:26px;align-items:start}
figure{margin:0}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:inherit!important}
figure image{image-rendering:pixelated}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{padding:3px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{text-align:left;font-weight:400;color:var(--faint);padding-right:10px}
td{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
table i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:7px}
.says{max-width:780px;margin:12px 0 0}
footer{border-top:1px solid var(--rule);margin-top:34px;padding-top:10px;font-size:13px;
color:var(--faint)}
@media(max-width:820px){.pair{grid-template-columns:minmax(0,1fr)}}
@media(max-width:640px){main{padding:20px 16px 40px}.tiles dd{font-size:18px;white-space:normal}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}
figure{overflow-x:auto}figure svg{width:620px}}
@media print{section{break-inside:avoid}}
"""
