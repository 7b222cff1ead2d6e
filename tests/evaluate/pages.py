"""Evaluations made by hand, and pages read back: their tags, tables and texts."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "input", "br", "link", "img", "hr"}
LOADING = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}


class Page(HTMLParser):
    """Well-formed, or AssertionError. `tables`: lists of rows of texts; `text`: all that is shown."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "table" in self.open and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data

    def row(self, *head: str) -> list[list[str]]:
        """Rows of any table that begin with these cells."""
        rows = [[cell.strip() for cell in row] for table in self.tables for row in table]
        return [row[len(head) :] for row in rows if row[: len(head)] == list(head)]

    def loads(self) -> list[str]:
        """Addresses that a browser would fetch or go to, other than places on the page itself."""
        found = [value or "" for _, of in self.tags for key, value in of.items() if key in LOADING]
        return [address for address in found if not address.startswith("#")]


def row(id: str, score: float | None, about: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    shown = {
        "prompt_tokens": 9,
        "question": f"What is {id}?",
        "reference": f"It is {id}.",
        "answer": "So.",
        "finish": "stop",
    }
    return {"id": id, "hash": "h", "about": about or {}, **shown, "seconds": 0.1, "scores": {"score": score}, **more}


def write_run(folder: Path, tasks: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]], **top: Any) -> Path:
    """results.json and TASK.jsonl of {task: (summary, rows)}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, rows) in tasks.items():
        lines = [json.dumps(one) + "\n" for one in rows]  # escapes half surrogates, as nothing else can hold them
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    shared = {"model": "runs/x/model", "template": "t", "seed": 42, "temperature": 0, "generation": {"context": 64}}
    summaries = {name: summary for name, (summary, _) in tasks.items()}
    (folder / "results.json").write_text(json.dumps({**shared, **top, "tasks": summaries}), encoding="utf-8")
    return folder
