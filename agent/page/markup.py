"""Small pieces of HTML; whatever text they are given is escaped."""

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """A text that is HTML already."""

    __slots__ = ()


# What stands in a table or a paragraph: HTML as it is, a text to be escaped, a number for people.
Content = Html | str | int | None


def html(content: Content) -> Html:
    """Content as HTML; None, which is "not known" or "none here", as a dash that is read aloud as nothing."""
    if isinstance(content, Html):
        return content
    if content is None:
        return Html('<span aria-hidden="true">&ndash;</span>')
    return Html(f"{content:,}" if isinstance(content, int) else escape(content))


def tag(name: str, content: Content, kind: str = "") -> Html:
    """An element, of a class where it is given one."""
    of_class = f' class="{kind}"' if kind else ""
    return Html(f"<{name}{of_class}>{html(content)}</{name}>")


def joined(contents: Iterable[Content], between: str = "") -> Html:
    """Several, one after the other."""
    return Html(between.join(map(html, contents)))


def table(titles: Sequence[str], rows: Iterable[Sequence[Content]], caption: Content = None) -> Html:
    """A table whose first column names its rows; a column that holds numbers stands to the right.

    Each element says its role, and each cell its title: where a phone shows rows as cards, by a style that
    takes them out of the table's layout, they are still cells of a table to who hears it.
    """
    rows = list(rows)
    kinds = ["number" if any(isinstance(row[at], int) for row in rows) else "" for at in range(len(titles))]
    head = joined(_cell("th", "columnheader", title, kind) for title, kind in zip(titles, kinds, strict=True))
    body = joined(_row(row, titles, kinds) for row in rows)
    above = tag("caption", caption) if caption is not None else ""
    return Html(
        f'<table role="table">{above}<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )


def _row(row: Sequence[Content], titles: Sequence[str], kinds: Sequence[str]) -> Html:
    cells = zip(row[1:], titles[1:], kinds[1:], strict=True)
    data = joined(
        _cell("td", "cell", cell, f"{kind} none".strip() if cell is None else kind, title)
        for cell, title, kind in cells
    )
    return Html(f'<tr role="row">{_cell("th", "rowheader", row[0])}{data}</tr>')


def _cell(name: str, role: str, content: Content, kind: str = "", title: str = "") -> Html:
    scope = {"columnheader": "col", "rowheader": "row"}.get(role, "")
    attributes = {"role": role, "scope": scope, "class": kind, "data-title": title}
    written = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{written}>{html(content)}</{name}>")
