"""Pieces of documents: every one is accounted for, longer ones come sooner, each with every task once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from longalign.config import compose_config
from longalign.data.self_instruct.pieces import TASKS, Piece, candidates, cjk_share, survey
from longalign.errors import UserError
from longalign.schema import SelfInstruct


def words_of(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def settings(documents: Path, *words: str) -> SelfInstruct:
    base = [f"source.documents={documents}", "source.model=m", "source.min_tokens=4", "source.max_tokens=10"]
    source = compose_config("prepare", ["source=self_instruct", *base, *words]).source
    assert isinstance(source, SelfInstruct)
    return source


def words(n: int, salt: str = "w") -> str:
    return " ".join(f"{salt}{i}" for i in range(n))


def piece(name: str, tokens: int) -> Piece:
    return Piece(Path(name), name, 1, (0, 1), name, tokens, "en")


def test_every_document_becomes_pieces_or_a_reason(tmp_path: Path) -> None:
    texts = {
        "fits.txt": words(10),
        "long.md": "\n\n".join([words(6, "a"), words(4, "b"), words(7, "c"), words(3, "d") + "\n\n" + words(2, "e")]),
        "short.txt": words(3),
        "sub/copy.txt": "\n" + words(10) + " \n",
        "empty.html": "<head><title>x</title></head>",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    found = survey(settings(tmp_path), words_of)
    assert found.found == 6
    assert [(p.document, p.number, p.tokens, p.text()) for p in found.pieces] == [
        ("fits.txt", 1, 10, words(10)),
        ("long.md", 1, 10, words(6, "a") + "\n\n" + words(4, "b")),
        ("long.md", 2, 10, words(7, "c") + "\n\n" + words(3, "d")),
    ]
    assert found.left_out == [
        {"document": "empty.html", "reason": "too short", "detail": "0 tokens"},
        {"document": "long.md", "reason": "rest too short", "detail": "2 tokens"},
        {"document": "picture.png", "reason": "unreadable", "detail": "not text"},
        {"document": "short.txt", "reason": "too short", "detail": "3 tokens"},
        {"document": "sub/copy.txt", "reason": "duplicate", "detail": "of fits.txt"},
    ]


def test_nothing_to_ask_about(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        survey(settings(tmp_path / "absent"), words_of)
    with pytest.raises(UserError, match="no file in it"):
        survey(settings(tmp_path), words_of)
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(UserError, match=r"none of 1 documents can be used \(1 too short\); source.min_tokens=4"):
        survey(settings(tmp_path), words_of)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(5))
    found = survey(settings(tmp_path / "a.txt"), words_of)
    assert found.pieces[0].document == "a.txt"
    (tmp_path / "a.txt").write_text(words(5, "v"))
    with pytest.raises(UserError, match=r"a\.txt was changed during the run"):
        found.pieces[0].text()


@pytest.mark.parametrize(
    ("languages", "got"), [("[en,zh]", {"en", "zh"}), ("[zh]", {"zh"}), ("[en]", {"en"}), ("[zh,en]", {"en", "zh"})]
)
def test_language_of_the_questions(languages: str, got: set[str], tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text(words(5))
    (tmp_path / "zh.txt").write_text("这 是 一 本 书，by A. Author")
    found = survey(settings(tmp_path, f"source.languages={languages}"), words_of)
    assert {p.language for p in found.pieces} == got
    if len(got) == 2:
        assert {p.document: p.language for p in found.pieces} == {"en.txt": "en", "zh.txt": "zh"}


def test_share_of_chinese() -> None:
    assert cjk_share("ab 长文\n") == 0.5
    assert cjk_share("𠮷。") == 0.5
    assert cjk_share("ひらがな한국어") == 0
    assert cjk_share(" \n") == 0


def test_every_piece_has_every_task_once_and_no_second_before_all_have_one() -> None:
    pieces = [piece(str(n), 10 + n) for n in range(7)]
    drawn = candidates(pieces, 1.0, 3)
    assert Counter((p.document, task) for p, task in drawn) == Counter((p.document, t) for p in pieces for t in TASKS)
    for turn in range(len(TASKS)):
        assert {p.document for p, _ in drawn[7 * turn : 7 * turn + 7]} == {p.document for p in pieces}
    assert drawn == candidates(pieces, 1.0, 3)
    assert drawn != candidates(pieces, 1.0, 4)


@pytest.mark.parametrize(("weight", "chance"), [(0, 1 / 2), (1, 3 / 4), (2, 9 / 10)])
def test_longer_pieces_come_first_as_often_as_said(weight: float, chance: float) -> None:
    pieces = [piece("short", 10_000), piece("long", 30_000)]
    first = [candidates(pieces, weight, seed)[0] for seed in range(2000)]
    assert sum(p.document == "long" for p, _ in first) / 2000 == pytest.approx(chance, abs=0.045)  # four deviations
    tasks = Counter(task for _, task in first)
    assert all(tasks[task] == pytest.approx(500, abs=80) for task in TASKS)
