"""Draw the architecture from the code: which module imports which, packages as rooms.

    python -m tools.draw_architecture            # docs/architecture.dot, .svg and .md's table
    python -m tools.draw_architecture --check    # exit code 2 where they are not the code's

Imports are read from the sources, those inside functions too; nothing is run. In a room a
module stands above all that it imports there; arrows lead from room to room and are what
`RULE` allows. Drawn by Graphviz (`dot`, Debian: `apt install graphviz`); the check needs
none, since the picture carries the digest of the graph it was drawn from.
"""

from __future__ import annotations

import ast
import hashlib
import html
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from streamer.console import Parser, command, say
from streamer.errors import StreamerError

ROOT = Path(__file__).parents[1]
DOT, SVG, PAGE = (ROOT / "docs" / f"architecture.{kind}" for kind in ("dot", "svg", "md"))
BEGIN, END = "<!-- modules: tools/draw_architecture.py -->", "<!-- end of modules -->"
WIDE = 6  # modules side by side in a room

RULE = {
    "tools": {"streamer", "mtp", "cache", "kernels"},
    "streamer": {"mtp", "cache", "kernels"},
    "mtp": {"kernels"},
    "cache": {"kernels"},
    "kernels": set(),
}
ROOMS = {
    "tools": ("make, train, convert, trace, simulate", "#f1efe8"),
    "streamer": ("the runtime: checkpoints, disk, pool, budget, decode loop", "#dcebf7"),
    "mtp": ("drafting heads, verification, rollback", "#e3f1e0"),
    "cache": ("compressed KV caches", "#f9ecd4"),
    "kernels": ("CPU, Metal and CUDA kernels", "#f3dfe6"),
}
Imports = dict[str, set[str]]  # module -> modules of ours that it imports


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Modules by dotted name; a package's own is named as the package."""
    found = {}
    for package in RULE:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(modules: dict[str, Path]) -> Imports:
    """What each imports of the others, itself left out."""
    return {
        name: {m for m in (_module(n, modules) for n in _names(name, path)) if m} - {name}
        for name, path in modules.items()
    }


def _names(module: str, path: Path) -> list[str]:
    """Dotted names that a source imports, `a.b.c` for `from a.b import c` too."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


def _module(name: str, modules: dict[str, Path]) -> str | None:
    """The module that a dotted name lies in, or None for someone else's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def breaches(found: Imports) -> list[str]:
    """Imports against the rule, a line each."""
    return [
        f"{module} imports {other}"
        for module, others in found.items()
        for other in sorted(others)
        if _room(other) not in RULE[_room(module)] | {_room(module)}
    ]


def _room(module: str) -> str:
    return module.split(".")[0]


def floors(names: list[str], found: Imports) -> list[list[str]]:
    """Modules of one room from the top down, each above all that it imports there.

    Those that import each other, a function of one the other, share a floor.
    """
    below = {name: found[name] & set(names) for name in names}
    while True:
        wider = {n: seen.union(*(below[other] for other in seen)) for n, seen in below.items()}
        if wider == below:
            break
        below = wider
    together = {n: frozenset({n} | {m for m in below[n] if n in below[m]}) for n in names}
    depth: dict[frozenset[str], int] = {}
    order = TopologicalSorter(
        {
            part: {together[m] for m in below[next(iter(part))]} - {part}
            for part in together.values()
        }
    )
    for part in order.static_order():
        under = {together[m] for m in below[next(iter(part))]} - {part}
        depth[part] = 1 + max((depth[other] for other in under), default=-1)
    levels = range(max(depth.values(), default=-1), -1, -1)
    return [[n for n in sorted(names) if depth[together[n]] == level] for level in levels]


def graph(modules: dict[str, Path], found: Imports) -> str:
    """The drawing in Graphviz's language."""
    lines = [
        "// drawn from the imports by tools/draw_architecture.py",
        "digraph architecture {",
        '  graph [rankdir=TB, bgcolor=white, nodesep=0.6, ranksep=0.55, fontname="Helvetica"]',
        '  node [shape=plain, fontname="Helvetica", fontsize=12]',
        '  edge [fontname="Helvetica", fontsize=11, color="#555555", fontcolor="#333333"]',
    ]
    for room, (what, colour) in ROOMS.items():
        names = [name for name in modules if _room(name) == room]
        lines.append(f"  {room} [label=<{_table(room, what, colour, floors(names, found))}>]")
    for room in RULE:
        for other in sorted(RULE[room]) if room != "tools" else ["streamer"]:
            used = sorted({m for n in found if _room(n) == room for m in found[n]})
            used = [_short(m) for m in used if _room(m) == other]
            if used:
                lines.append(f'  {room} -> {other} [label="{_label(used)}"]')
    lines += ["  {rank=same; mtp; cache}", "}"]
    return "\n".join(lines) + "\n"


def _label(used: list[str], width: int = 26) -> str:
    rows = [""]
    for name in used:
        if rows[-1] and len(rows[-1]) + len(name) > width:
            rows.append("")
        rows[-1] += ("  " if rows[-1] else " ") + name
    return "\\l".join(rows) + "\\l" if len(rows) <= 8 else f" {len(used)} modules "


def _table(room: str, what: str, colour: str, levels: list[list[str]]) -> str:
    """A room: its name, and a band of boxes for each floor."""
    width = 16 + 7 * max(len(_short(name)) for level in levels for name in level)
    box = f'BGCOLOR="white" BORDER="1" COLOR="#9aa7b1" FIXEDSIZE="TRUE" WIDTH="{width}" HEIGHT="22"'
    bands = [
        f'<TR><TD><FONT POINT-SIZE="20"><B>{room}</B></FONT>  '
        f'<FONT POINT-SIZE="13">{html.escape(what)}</FONT></TD></TR>'
    ]
    for level in levels:
        cells = [f"<TD {box}>{_short(name)}</TD>" for name in level if name != room]
        lines = -(-len(cells) // WIDE)
        each = -(-len(cells) // max(1, lines))
        rows = ["".join(cells[at : at + each]) for at in range(0, len(cells), max(1, each))]
        bands += [
            '<TR><TD><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="4" CELLPADDING="0">'
            f"<TR>{row}</TR></TABLE></TD></TR>"
            for row in rows
        ]
        bands.append('<TR><TD HEIGHT="4"></TD></TR>')
    return (
        f'<TABLE BORDER="1" COLOR="#6b7a86" STYLE="ROUNDED" CELLBORDER="0" CELLSPACING="0" '
        f'CELLPADDING="0" BGCOLOR="{colour}">{"".join(bands)}</TABLE>'
    )


def _short(name: str) -> str:
    return name.partition(".")[2] or name


def draw(text: str) -> str:
    """The graph as SVG, with its digest. Raises StreamerError without Graphviz."""
    try:
        done = subprocess.run(
            ["dot", "-Tsvg"], input=text, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise StreamerError("drawing takes Graphviz's `dot`; apt install graphviz") from None
    if done.returncode:
        raise StreamerError(f"dot failed: {' '.join(done.stderr.split())[:200]}")
    head, svg, rest = done.stdout.partition("<svg")
    return f"{head}<!-- {digest(text)} -->\n{svg}{rest}"


def digest(text: str) -> str:
    return f"graph {hashlib.sha256(text.encode()).hexdigest()}"


def page(text: str, modules: dict[str, Path], found: Imports) -> str:
    """`text`, docs/architecture.md, with the table of modules between its marks renewed."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise StreamerError(f"{PAGE.name} has no place for the table: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{_listing(modules, found)}{END}{after}"


def _listing(modules: dict[str, Path], found: Imports) -> str:
    lines = []
    for room in RULE:
        names = [name for name in modules if _room(name) == room]
        lines += [
            "",
            f"### {room}",
            "",
            "| module | what it is | imports of ours |",
            "|---|---|---|",
        ]
        for name in (n for level in floors(names, found) for n in level):
            text = ast.get_docstring(ast.parse(modules[name].read_text(encoding="utf-8"))) or ""
            used = ", ".join(
                f"`{_short(m) if _room(m) == room else m}`" for m in sorted(found[name])
            )
            lines.append(f"| `{name}` | {text.splitlines()[0] if text else ''} | {used} |")
    return "\n".join(lines) + "\n\n"


@command
def main(argv: list[str] | None = None) -> int:
    p = Parser(prog="draw_architecture", description="Draw packages, modules and imports.")
    p.add_argument("--check", action="store_true", help="only say whether docs/ is up to date")
    args = p.parse_args(argv)
    modules = sources()
    found = imports(modules)
    if against := breaches(found):
        raise StreamerError(f"imports against the rule: {'; '.join(against)}")
    text = graph(modules, found)
    written = page(PAGE.read_text(encoding="utf-8"), modules, found)
    if args.check:
        current = (
            DOT.read_text(encoding="utf-8") == text
            and digest(text) in SVG.read_text(encoding="utf-8")
            and PAGE.read_text(encoding="utf-8") == written
        )
        if not current:
            raise StreamerError("docs/architecture.* is not the code's; run this without --check")
        return 0
    svg = draw(text)
    for path, content in ((DOT, text), (SVG, svg), (PAGE, written)):
        path.write_text(content, encoding="utf-8")
    say(f"{len(modules)} modules in {SVG.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
