"""A tiled attention loop as an animation that one can scrub, in one self-contained piece of HTML.

The frames are those of `bench.trace`: tile by tile the scores, the running maximum m, sum l and accumulator of the rows
at hand, and the bytes moved so far. A slider, buttons and the arrow keys move through them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from tilewise.bench.trace import Trace

CELL = 22
"""Pixels a score."""

_NAMES = {
    "v1": "Version 1: K/V tiles outside; O, m, l go back to memory at every step",
    "v2": "Version 2: Q tiles outside; O, m, l stay on chip until a row is done",
}

STYLE = """
.scrub { border: 1px solid var(--line); border-radius: 10px; padding: 1rem; margin: 0.8rem 0; }
.scrub .stage { display: flex; flex-wrap: wrap; gap: 1rem 1.6rem; align-items: flex-start; }
.scrub svg { flex: none; max-width: 100%; height: auto; }
.scrub svg text { font-size: 8px; fill: var(--text); font-family: ui-monospace, Menlo, Consolas, monospace; }
.scrub .cell { fill: var(--card); stroke: var(--line); }
.scrub .done { fill: var(--mark); }
.scrub .now { fill: var(--good-tint); stroke: var(--good); }
.scrub .skip { fill: var(--line); opacity: 0.55; }
.scrub .controls { display: flex; flex-wrap: wrap; gap: 0.6rem; align-items: center; margin-top: 0.8rem; }
.scrub input[type=range] { flex: 1 1 12rem; accent-color: var(--accent); }
.scrub button { font: inherit; padding: 0.2rem 0.8rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); color: var(--text); cursor: pointer; }
.scrub table { width: auto; font-size: 0.86rem; }
.scrub figcaption { margin-bottom: 0.6rem; }
"""

SCRIPT = """
(function () {
  function number(x) { return x === null ? "−∞" : x.toFixed(2); }
  function start(root) {
    var t = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    var range = root.querySelector("input"), out = root.querySelector("output");
    var cells = root.querySelectorAll(".cell"), timer = null;
    function tile(i, j, name) {
      for (var r = i * t.block_m; r < Math.min(t.n, (i + 1) * t.block_m); r++)
        for (var c = j * t.block_n; c < Math.min(t.m, (j + 1) * t.block_n); c++)
          cells[r * t.m + c].classList.add(name);
    }
    function draw(step) {
      cells.forEach(function (cell) { cell.setAttribute("class", "cell"); });
      t.skipped.forEach(function (s) { tile(s[0], s[1], "skip"); });
      for (var k = 0; k < step; k++) tile(t.frames[k].row_tile, t.frames[k].col_tile, "done");
      var f = t.frames[step];
      tile(f.row_tile, f.col_tile, "now");
      root.querySelectorAll(".score").forEach(function (text) {
        var r = +text.dataset.r - f.row_tile * t.block_m, c = +text.dataset.c - f.col_tile * t.block_n;
        var inside = f.scores[r] !== undefined && f.scores[r][c] !== undefined;
        text.textContent = inside ? (f.scores[r][c] === null ? "−∞" : f.scores[r][c].toFixed(1)) : "";
      });
      var rows = f.m.map(function (m, r) {
        return "<tr><th scope=row>" + (f.row_tile * t.block_m + r) + "</th><td>" + number(m) + "</td><td>" +
          number(f.l[r]) + "</td><td>" + f.acc[r].map(number).join("&ensp;") + "</td></tr>";
      }).join("");
      root.querySelector("tbody").innerHTML = rows;
      out.textContent = "step " + (step + 1) + " of " + t.frames.length + ": Q tile " + f.row_tile + ", K/V tile " +
        f.col_tile + " · read " + f.bytes_read + " B, written " + f.bytes_written + " B · on chip " + f.on_chip_bytes +
        " B · rescalings: " + f.rescalings + ", divisions: " + f.divisions;
    }
    function go(step) {
      range.value = Math.max(0, Math.min(t.frames.length - 1, step));
      draw(+range.value);
    }
    function stop() { clearInterval(timer); timer = null; root.querySelector(".play").textContent = "Play"; }
    range.addEventListener("input", function () { stop(); draw(+range.value); });
    root.querySelector(".back").addEventListener("click", function () { stop(); go(+range.value - 1); });
    root.querySelector(".next").addEventListener("click", function () { stop(); go(+range.value + 1); });
    root.querySelector(".play").addEventListener("click", function () {
      if (timer) { stop(); return; }
      if (+range.value === t.frames.length - 1) go(0);
      this.textContent = "Pause";
      timer = setInterval(function () {
        if (+range.value === t.frames.length - 1) stop(); else go(+range.value + 1);
      }, 700);
    });
    draw(0);
  }
  document.querySelectorAll(".scrub").forEach(start);
})();
"""


def scrubber(trace: Trace) -> str:
    """The HTML of one trace, without style and script (`STYLE`, `SCRIPT`), which a page needs once."""
    width, height = trace.m * CELL + 2, trace.n * CELL + 2
    cells, texts = [], []
    for row in range(trace.n):
        for column in range(trace.m):
            x, y = column * CELL + 1, row * CELL + 1
            cells.append(f'<rect class="cell" x="{x}" y="{y}" width="{CELL}" height="{CELL}"/>')
            texts.append(
                f'<text class="score" data-r="{row}" data-c="{column}" x="{x + CELL / 2}" y="{y + CELL / 2}" '
                'dy="0.35em" text-anchor="middle"></text>'
            )
    data = json.dumps(trace.as_dict(), allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    last = len(trace.frames) - 1
    total = trace.total
    return (
        f'<figure class="scrub"><figcaption>{escape(_NAMES[trace.version])}</figcaption><div class="stage">'
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="The {trace.n}×{trace.m} score matrix, tile by tile">{"".join(cells)}{"".join(texts)}</svg>'
        "<table><thead><tr><th scope=col>row</th><th scope=col>m</th><th scope=col>l</th><th scope=col>accumulator</th>"
        "</tr></thead><tbody></tbody></table></div>"
        '<div class="controls"><button type="button" class="play">Play</button>'
        '<button type="button" class="back" aria-label="one step back">◀</button>'
        '<button type="button" class="next" aria-label="one step on">▶</button>'
        f'<input type="range" min="0" max="{last}" value="0" step="1" aria-label="step"></div>'
        f'<p><output aria-live="polite">{len(trace.frames)} steps: {total.bytes_read} B read, {total.bytes_written} B '
        "written</output></p>"
        f'<script type="application/json">{data}</script></figure>'
    )


def scrubbers(traces: Sequence[Trace]) -> str:
    """Several traces with the style and the script that move them: one piece of HTML that loads nothing."""
    figures = "".join(scrubber(trace) for trace in traces)
    return f"<style>{STYLE}</style>{figures}<script>{SCRIPT}</script>"
