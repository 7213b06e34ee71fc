"""The profile of the demo and of an inflated demo: its document, its page, its command line."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from streamer import figures, profile
from streamer.forecast import GENERATED
from streamer.profiler import PARTS
from streamer.report import FORMS, lookup, page
from streamer.run import DEMO
from tools import inflate

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 40
NUMBER = re.compile(r'<data value="([^"]*)" data-path="([^"]*)" data-form="([^"]*)">([^<]*)</data>')
DRAWN = {
    "memory": figures.draw_memory,
    "steps": figures.draw_steps,
    "experts": figures.draw_experts,
    "pool": figures.draw_pool,
    "sweep": figures.draw_sweep,
    "drafts": figures.draw_drafts,
    "reads": figures.draw_reads,
}


class Made:
    """A profile that was made: its files and its document."""

    def __init__(self, folder: Path, *options: str):
        self.page, file = folder / "report.html", folder / "profile.json"
        argv = ["--max-tokens", str(TOKENS), "--out", str(self.page), "--json", str(file)]
        command = [sys.executable, "-m", "streamer.profile", *argv, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.text = self.page.read_text(encoding="utf-8")
        self.document: dict[str, Any] = json.loads(file.read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Made:
    # Long enough for samples of memory, which are held to a share of the time.
    return Made(tmp_path_factory.mktemp("demo"), "--memory", "50%", "--max-tokens", "160")


@pytest.fixture(scope="module")
def inflated(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("inflated")
    inflate.main([str(DEMO), str(folder / "model"), "--expert-bytes", "200KB"])
    options = ("--mtp", "2", "--executor", "rehearse", "--io", "direct", "--sweep", "30%,100%")
    return Made(folder, "--model", str(folder / "model"), *options)


@pytest.fixture(scope="module")
def small(inflated: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    options = ("--mtp", "1", "--kv-bits", "3.5", "--memory", "25%", "--max-tokens", "160")
    model = inflated.page.parent / "model"
    return Made(tmp_path_factory.mktemp("small"), "--model", str(model), *options)


@pytest.fixture(params=["demo", "inflated"])
def made(request: pytest.FixtureRequest) -> Made:
    return request.getfixturevalue(request.param)


# The document


@pytest.mark.parametrize("name", ["demo", "inflated", "small"])
def test_owners_add_up_to_the_footprint_at_every_sample(
    name: str, request: pytest.FixtureRequest
) -> None:
    made: Made = request.getfixturevalue(name)
    memory = made.document["memory"]
    assert len(memory["seconds"]) > 5
    together = np.sum(list(memory["owners"].values()), axis=0)
    error = np.abs(together / np.array(memory["footprint"]) - 1)
    assert error.max() <= 0.05
    assert error.max() == pytest.approx(memory["worst_error"])
    assert max(memory["footprint"]) <= made.document["run"]["peak_bytes"] + (1 << 20)
    held = made.document["budget"]
    for owner in ("trunk", "pool", "head"):
        assert memory["largest"][owner] == pytest.approx(held[owner], rel=0.02)
    assert 0 < memory["largest"]["kv"] <= held["kv"] + held["head_kv"]


def test_a_steps_parts_are_its_time(made: Made) -> None:
    steps = made.document["steps"]
    parts = np.sum([steps[part] for part in PARTS], axis=0)
    assert np.diff(steps["seconds"]) == pytest.approx(parts[1:], abs=1e-5)
    assert all(min(steps[part]) >= 0 for part in PARTS)
    spent = {part for part in PARTS if sum(steps[part]) > 0}
    assert {"compute", "host", "waiting"} <= spent
    assert ({"drafting", "verifying", "rehearsing"} <= spent) == ("verify" in steps["kind"])


def test_every_expert_is_accounted_for(made: Made) -> None:
    document = made.document
    experts, steps = document["experts"], document["steps"]
    missed = sum(map(sum, experts["misses"]))
    assert missed == experts["missed"] == sum(steps["misses"]) > 0
    assert sum(steps["asked"]) == experts["hits"] + experts["missed"]
    chosen = sum(map(sum, experts["use"]))
    assert chosen % document["model"]["experts_per_token"] == 0
    assert chosen >= sum(steps["asked"])
    assert document["reads"]["bytes"] == document["run"]["bytes_read"]
    resident = sum(map(sum, experts["residency"]))
    assert 0 < resident <= experts["slots"] + 1e-6


def test_drafts_by_depth(inflated: Made, demo: Made) -> None:
    assert demo.document["drafts"]["depth"] == []
    drafts, steps = inflated.document["drafts"], inflated.document["steps"]
    assert drafts["depth"] == [1, 2]
    assert drafts["drafted"][0] == drafts["verify_passes"] == steps["kind"].count("verify")
    assert 0 < drafts["accepted"][1] <= drafts["accepted"][0] <= drafts["drafted"][0]
    verified = [r for r, kind in zip(steps["rows"], steps["kind"], strict=True) if kind == "verify"]
    assert sum(verified) == sum(drafts["drafted"]) + drafts["verify_passes"]


def test_a_replay_on_the_runs_own_pool_is_the_run(demo: Made) -> None:
    pool, steps = demo.document["pool"], demo.document["steps"]
    at = pool["here"]
    chosen = [i for i, kind in enumerate(steps["kind"]) if kind in GENERATED]
    missed = sum(steps["misses"][i] for i in chosen)
    # nearly: when a layer that is wholly resident is told of differs
    assert pool["misses_per_step"][at] == pytest.approx(missed / len(chosen), rel=0.02)
    asked = sum(steps["asked"][i] for i in chosen)
    assert pool["own"][at] == pytest.approx(1 - missed / asked, abs=0.01)
    for policy in ("own", "lru"):
        assert all(np.array(pool["belady"]) >= np.array(pool[policy]))
    assert np.all(np.diff(pool["belady"]) >= 0) and pool["own"][-1] == 1


def test_a_sweep_runs_every_budget(inflated: Made) -> None:
    sweep = inflated.document["sweep"]
    assert sweep["memory"] == ["30%", "100%"] and sweep["source"] == 0
    assert sweep["slots"][1] > sweep["slots"][0] and sweep["budget_bytes"][1] > 0
    assert sweep["hit_rate"][0] == pytest.approx(inflated.document["experts"]["generated_hit_rate"])
    assert all(
        peak <= b for peak, b in zip(sweep["peak_bytes"], sweep["budget_bytes"], strict=True)
    )


# The page


def test_the_page_stands_alone(made: Made) -> None:
    assert len(made.text.encode()) < 2 << 20
    without = re.sub(r'xmlns(:\w+)?="[^"]*"', "", made.text)
    assert not re.search(r"https?:|<script|@import|src=|url\((?!#)", without)
    names = re.findall(r'data-name="(\w+)"', made.text)
    wanted = {"memory", "steps", "experts", "pool", "reads"}
    assert set(names) == wanted | ({"sweep", "drafts"} if "sweep" in made.document else set())


def test_every_number_is_the_documents(made: Made) -> None:
    numbers = NUMBER.findall(made.text)
    assert len(numbers) > 60
    for value, path, form, shown in numbers:
        true = lookup(made.document, path)
        assert json.loads(html.unescape(value)) == true, path
        assert html.unescape(shown) == FORMS[form](true), path
    # and there are no others
    told = NUMBER.sub("", made.text[made.text.index("<body>") :])
    told = re.sub(r"<svg.*?</svg>|<code>.*?</code>", "", told, flags=re.DOTALL)
    assert not re.search(r"\d", re.sub(r"<[^>]*>", "", told).replace("&#x27;", ""))


def series(figure: Figure) -> dict[str, Any]:
    return {a.get_gid(): a for a in figure.findobj(lambda a: bool(a.get_gid()))}


def test_pictures_draw_the_documents_numbers(made: Made) -> None:
    document = made.document
    drawn = series(figures.draw_memory(document))
    scale, _ = figures.size_unit(max(document["memory"]["limit"], 1))
    line = drawn["memory.footprint"]
    assert line.get_ydata() * scale == pytest.approx(document["memory"]["footprint"])
    assert line.get_xdata() == pytest.approx(document["memory"]["seconds"])
    under = 0
    for gid in [g for g in drawn if g.startswith("memory.owners.")]:
        path = drawn[gid].get_paths()[0].vertices
        n = len(document["memory"]["seconds"])
        under += np.array(lookup(document, gid))
        tops = {path[1 : n + 1, 1].max(), path[n + 2 : 2 * n + 2, 1].max()}
        assert max(tops) * scale == pytest.approx(max(under))
    for gid, stairs in series(figures.draw_steps(document)).items():
        found = stairs.get_data()
        assert found.values - found.baseline == pytest.approx(1e3 * np.array(lookup(document, gid)))
    for gid, line in series(figures.draw_pool(document)).items():
        values = np.array(lookup(document, gid.removesuffix(".-1")))
        values = 100 * values if gid in ("pool.own", "pool.lru", "pool.belady") else values
        shown = line.get_ydata()
        assert shown == pytest.approx(values[-1:] if len(shown) == 1 else values[: len(shown)])
    for gid, image in series(figures.draw_experts(document)).items():
        assert image.get_array().tolist() == figures.grid(lookup(document, gid)).tolist()
    for gid, stairs in series(figures.draw_reads(document)).items():
        assert stairs.get_data().values.tolist() == lookup(document, gid)
    if "sweep" in document:
        for gid, line in series(figures.draw_sweep(document)).items():
            factor = 100 if gid.endswith("hit_rate") else 1
            assert line.get_ydata() == pytest.approx(factor * np.array(lookup(document, gid)))
        for gid, bar in series(figures.draw_drafts(document)).items():
            assert bar.get_height() == pytest.approx(100 * lookup(document, gid))


@pytest.mark.parametrize("speeds", ["measured", "flat", "steep"])
def test_no_legend_lies_on_a_curve(inflated: Made, speeds: str) -> None:
    document = json.loads(json.dumps(inflated.document))
    pool, sweep = document["pool"], document["sweep"]
    if speeds != "measured":
        n, low = len(pool["slots"]), 17.5 if speeds == "flat" else 1.0
        pool["tokens_per_second"] = np.linspace(low, 22, n).tolist()
        document["run"]["tokens_per_second"] = 20.9
        for i, name in enumerate(("", "forecast_")):
            sweep[f"{name}tokens_per_second"] = [low + i, 22.0]
            sweep[f"{name}hit_rate"] = [low / 22, 1.0]
    for draw in (figures.draw_pool, figures.draw_sweep):
        figure = draw(document)
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            box = axes.get_legend().get_window_extent()
            for line in axes.get_lines():
                path = line.get_transform().transform_path(line.get_path())
                assert not path.intersects_bbox(box, filled=False), (line.get_gid(), speeds)


@cache
def refusal() -> str | None:
    return browser.why_not()


@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
def test_the_pages_open_in_a_browser(demo: Made, inflated: Made) -> None:
    with browser.chromium() as driver:
        for made in (demo, inflated):
            assert browser.open_page(driver, made.page) == [], "the console is silent"
            for mode, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(23, 27, 31)")):
                browser.scheme(driver, mode)
                assert driver.execute_script(PAPER) == paper
                check_shown(driver, made, mode)
            browser.width(driver, 390)
            try:  # pictures keep a size that can be read, and scroll; the page does not
                assert driver.execute_script(SIDEWAYS) == [], "wider than a telephone"
                check_shown(driver, made, "dark")
            finally:
                browser.width(driver, 0)


SIDEWAYS = """const wide = document.documentElement.clientWidth;
return [...document.querySelectorAll('body, main, table, p, dl, h2, figure')].filter(
  e => e.getBoundingClientRect().right > wide + 1).map(e => e.tagName + ' ' + e.textContent)"""
PAPER = "return getComputedStyle(document.body).backgroundColor"
NUMBERS = """return [...document.querySelectorAll('data')].map(
  e => [e.getAttribute('value'), e.dataset.path, e.dataset.form, e.textContent,
        e.getBoundingClientRect().width > 0])"""
FIGURES = """return [...document.querySelectorAll('figure')].map(f => {
  const box = f.querySelector('svg').getBoundingClientRect();
  const drawn = [...f.querySelectorAll('g[id*="."], image[id*="."], path[id*="."]')].map(
    e => [e.id, e.getBBox().width + e.getBBox().height]);
  const fills = [...f.querySelectorAll('text')].map(t => getComputedStyle(t).fill);
  const outside = [...f.querySelectorAll('text')].filter(t => {
    const r = t.getBoundingClientRect();
    return r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 1;
  }).map(t => t.textContent);
  return [f.dataset.name, box.width, box.height, drawn, fills, outside]})"""
OVERLAPS = """const found = [];
for (const f of document.querySelectorAll('figure')) {
  const all = [...f.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  all.forEach(([a, r], i) => all.slice(i + 1).forEach(([b, s]) => {
    const x = Math.min(r.right, s.right) - Math.max(r.left, s.left);
    const y = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
    if (x > 1 && y > 3) found.push(f.dataset.name + ': ' + a + ' / ' + b);
  }));
}
return found"""


def check_shown(driver: Any, made: Made, mode: str) -> None:
    """Numbers, pictures and labels as the browser has laid them out."""
    for value, path, form, shown, visible in driver.execute_script(NUMBERS):
        true = lookup(made.document, path)
        assert visible and json.loads(value) == true and shown == FORMS[form](true), path
    pictures = {name: rest for name, *rest in driver.execute_script(FIGURES)}
    for name, (width, height, drawn, fills, outside) in pictures.items():
        assert width > 400 and height > 100, name
        shown = {gid.removeprefix(f"{name}-"): size for gid, size in drawn}
        wanted = set(series(DRAWN[name](made.document)))
        assert wanted and wanted <= set(shown), name
        assert all(shown[gid] > 0 for gid in wanted - {"memory.owners.kv"}), name
        bright = [sum(map(int, re.findall(r"\d+", fill)[:3])) > 380 for fill in fills]
        assert bright and all(b == (mode == "dark") for b in bright if fills), name
        assert not outside, (name, outside)
    assert driver.execute_script(OVERLAPS) == []


def test_the_heatmap_in_the_page_is_the_documents(demo: Made) -> None:
    found = re.search(r'xlink:href="data:image/png;base64,([^"]*)"', demo.text)
    assert found
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))
    table = figures.grid(demo.document["experts"]["use"])
    assert pixels.shape[:2] == table.shape
    wanted = (255 * figures.HEAT(table / table.max())[:, :, :3]).round()
    assert np.abs(pixels.astype(int) - wanted).max() <= 2 or (
        np.abs(pixels[::-1].astype(int) - wanted).max() <= 2
    )


# The command line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--out"),
        (["--out", "x.html", "--sweep", ","], "--sweep"),
        (["--out", "x.html", "--prompt", "/nowhere/prompt"], "cannot read the prompt"),
        (["--json", "x.json", "--memory", "1MB"], "smallest budget"),
        (["--json", "x.json", "--sweep", "50%,walrus"], "not a memory size"),
        (["--json", "x.json", "--sweep", "50%,200%"], "--memory 200%"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    argv: list[str], said: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])  # for a profile's own process
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    assert profile.main(argv) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.smoke
def test_a_page_without_matplotlib_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile.importlib.util, "find_spec", lambda name: None)
    assert profile.main(["--out", "x.html"]) == 2
    err = capsys.readouterr().err
    assert "-m pip install '" in err and err.endswith("[profile]'\n")


def test_a_page_of_a_run_without_reads(inflated: Made) -> None:
    """What such a run has nothing of is left out, and the rest stands."""
    document = json.loads(json.dumps(inflated.document))
    document["reads"] = {"count": 0}
    document["drafts"]["depth"] = []
    document["memory"]["page_cache"] = None
    del document["sweep"]
    names = re.findall(r'data-name="(\w+)"', page(document))
    assert names == ["memory", "steps", "experts", "pool"]
