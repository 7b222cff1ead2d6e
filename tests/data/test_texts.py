"""Text for continued training: documents as they are, and none lost unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import in_process

TINY = ["model=tiny"]  # whose tokenizer comes with longalign


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_document_is_written_or_named(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    texts = {f"doc{n}": f"The {n}th document.\r\n\r\nIt has two paragraphs: \u4e2d\u6587." for n in range(5)}
    for name, text in texts.items():
        (docs / f"{name}.txt").write_bytes(text.encode())
    (docs / "empty.txt").write_text(" \n")
    (docs / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (docs / "nul.txt").write_bytes(b"a\0b")
    words = ["prepare", "source=text", "source.documents=docs", "output_dir=out", *TINY]
    done = in_process(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = rows_of(tmp_path / "out/text.jsonl")
    assert {row["id"]: row["text"] for row in written} == {name: t.replace("\r\n", "\n") for name, t in texts.items()}
    left_out = json.loads((tmp_path / "out/text.json").read_text())["left_out"]
    assert {Path(row["file"]).name for row in left_out} == {"empty.txt", "latin.txt", "nul.txt"}
    assert all(row["file"] in done.stdout + done.stderr for row in left_out)
    again = in_process(*words, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already; overwrite=true replaces it" in again.stderr


def test_so_many_tokens_in_an_order_of_the_seed(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for n in range(20):
        (docs / f"{n:02d}.txt").write_text(f"document {n} " * 40)
    orders = []
    for seed in (1, 2, 1):
        words = [
            "source=text",
            "source.documents=docs",
            f"output_dir=out{len(orders)}",
            f"seed={seed}",
            "source.tokens=600",
        ]
        done = in_process("prepare", *words, *TINY, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        orders.append([row["id"] for row in rows_of(tmp_path / f"out{len(orders)}/text.jsonl")])
        about = json.loads((tmp_path / f"out{len(orders) - 1}/text.json").read_text())
        assert about["tokens"] >= 600
        assert about["documents"] == len(orders[-1]) < 20
    assert orders[0] == orders[2] != orders[1]


def test_only_unreadable_documents_are_said(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/nul.txt").write_bytes(b"a\0b")
    done = in_process("prepare", "source=text", "source.documents=docs", "output_dir=out", *TINY, cwd=tmp_path)
    assert done.returncode == 2
    assert "no document can be read (not text)" in done.stderr
    assert not (tmp_path / "out/text.jsonl").exists()
