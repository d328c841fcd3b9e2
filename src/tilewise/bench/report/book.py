"""The lab as one HTML book: the learning path, every lesson with its output and pictures, and the glossary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from tilewise.bench.lab import Run, Shown

_LIGHT, _DARK = "default", "github-dark"


def book(runs: Sequence[Run], path_text: str, glossary: str, environment: dict[str, str]) -> str:
    """The whole book as one document that loads nothing.

    Args:
        path_text, glossary: markdown.
        environment: where the lessons ran.
    """
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("tilewise.bench.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    chapters = [
        {
            "number": run.lesson.number,
            "title": run.lesson.title,
            "seconds": f"{run.seconds:.1f}",
            "body": "".join(_cell(shown) for shown in run.shown),
            "error": run.error,
        }
        for run in runs
    ]
    return templates.get_template("book.html.jinja").render(
        chapters=chapters,
        path=_markdown(path_text),
        glossary=_markdown(glossary),
        environment=environment,
        code_style=_code_style(),
    )


def _markdown(text: str) -> str:
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    # The book has the one first-level heading, and a lesson's own title is its chapter's.
    return re.sub(r"<(/?)h([1-4])>", lambda found: f"<{found[1]}h{int(found[2]) + 1}>", html)


def _cell(shown: Shown) -> str:
    if shown.cell.kind == "markdown":
        return _markdown(re.sub(r"^# .*\n?", "", shown.cell.source, count=1))
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    code = highlight(shown.cell.source, PythonLexer(), HtmlFormatter(nowrap=True))
    parts = [f'<pre class="code" tabindex="0"><code>{code}</code></pre>']
    if shown.text.strip():
        parts.append(f'<pre class="output" tabindex="0"><samp>{escape(shown.text.rstrip())}</samp></pre>')
    for title, picture in shown.pictures:
        if "<figure" in picture:
            parts.append(picture)
        else:
            parts.append(f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>")
    return "".join(parts)


def _code_style() -> str:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style=_LIGHT).get_style_defs("pre.code")
    dark = HtmlFormatter(style=_DARK).get_style_defs("pre.code")
    rules = [re.sub(r"background(-color)?: [^;}]+;?", "", style) for style in (light, dark)]
    return f"{rules[0]}\n@media (prefers-color-scheme: dark) {{\n{rules[1]}\n}}"
