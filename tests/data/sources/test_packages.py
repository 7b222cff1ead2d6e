"""Documents of packages: archives made here, whose every file ends in a document or is named with a reason."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import in_process

TINY = ["model=tiny"]  # whose tokenizer comes with longalign

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n\nA description.\n"


def prose(topic: str, paragraphs: int) -> str:
    """Paragraphs that differ from one another and from those of other topics."""
    return "\n\n".join(
        f"On {topic}, part {n}: the harbour of {topic} has {n} ships, and each of them carries {n + 7} barrels of oil."
        for n in range(paragraphs)
    )


def wheel(folder: Path, name: str, files: dict[str, str | bytes], version: str = "1.0") -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", METADATA.format(name=name, version=version))
    return path


def sdist(folder: Path, name: str, files: dict[str, str]) -> None:
    with tarfile.open(folder / f"{name}-2.0.tar.gz", "w:gz") as archive:
        for file, content in {**files, "PKG-INFO": METADATA.format(name=name, version="2.0")}.items():
            member = tarfile.TarInfo(f"{name}-2.0/{file}")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))


def run(folder: Path, *words: str) -> tuple[Any, list[dict[str, Any]], str]:
    """The manifest, what was left out, and what was said."""
    settings = ["source.min_tokens=300", "source.max_tokens=600", "output_dir=out", *words]
    done = in_process("prepare", "source=packages", "source.path=wheels/*", *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = (folder / "out/documents_dropped.jsonl").read_text().splitlines()
    return json.loads((folder / "out/documents.json").read_text()), list(map(json.loads, rows)), done.stderr


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def test_every_file_is_in_a_document_or_named(wheels: Path) -> None:
    code = f'"""{prose("code", 8)}"""\n\n\nclass Ship:\n    """{prose("ships", 8)}"""\n\n    def sail(self, to=None):\n        pass\n'
    wheel(
        wheels,
        "alpha",
        {
            "docs/guide.md": prose("guides", 60),
            "docs/nul.txt": prose("nul", 20).replace("harbour", "har\0bour", 1),
            "alpha/__init__.py": code,
            "alpha/broken.py": "def (:\n" + prose("broken", 10),
            "docs/latin.txt": (prose("latin", 10) + " caf\xe9").encode("latin-1"),
            "docs/repeats.rst": prose("guides", 50),
            "docs/table.txt": "| 1.5 | 2.5 |\n" * 80,
            "docs/empty.md": "",
            "tests/test_alpha.py": code,
            "LICENSE.txt": prose("licences", 20),
        },
    )
    sdist(wheels, "beta", {"README.rst": prose("betas", 40)})
    manifest, dropped, _ = run(wheels.parent, *TINY)
    reasons = {row["file"].partition(".whl:")[2]: row["reason"] for row in dropped if ":" in row["file"]}
    assert reasons == {
        "alpha/broken.py": "unreadable",
        "docs/latin.txt": "unreadable",
        "docs/repeats.rst": "repeats others",
        "docs/table.txt": "no prose",
        "docs/empty.md": "short",
    }
    text = "".join(file.read_text() for file in sorted((wheels.parent / "out/documents").glob("*.txt")))
    assert "\0" not in text
    assert "Ship\n\nOn ships, part 0" in text
    joined = "".join(text.split())  # a document may end within a paragraph
    lost = sum(row["tokens"] for row in dropped if row["reason"] == "rest below min_tokens")
    for topic, parts in {"guides": 60, "nul": 20, "code": 8, "ships": 8, "betas": 40}.items():
        found = [n for n in range(parts) if f"On{topic},part{n}:" in joined]
        assert found == list(range(len(found))), "in order, and only a package's end is missing"
        assert len(found) == parts or lost, topic
    assert {(row["name"], row["version"], row["licence"]) for row in manifest["documents"]} == {
        ("alpha", "1.0", "MIT"),
        ("beta", "2.0", "MIT"),
    }
    assert all(300 <= row["tokens"] <= 600 for row in manifest["documents"])
    assert sum(manifest["left_out"].values()) == len(dropped)


def test_a_broken_archive_is_named_and_the_others_are_read(wheels: Path) -> None:
    wheel(wheels, "alpha", {"docs/guide.md": prose("guides", 40)})
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 not a zip")
    damaged = wheel(wheels, "crc", {"docs/a.md": prose("damage", 40)})
    damaged.write_bytes(damaged.read_bytes().replace(b"part 3:", b"part 4:", 1))
    (wheels / "cut-1.0.tar.gz").write_bytes(b"\x1f\x8b\x08\x00" + b"\0" * 20)
    manifest, dropped, said = run(wheels.parent, *TINY)
    broken = [Path(row["file"]).name for row in dropped if row["reason"] == "unreadable archive"]
    assert broken == ["broken-1.0-py3-none-any.whl", "crc-1.0-py3-none-any.whl", "cut-1.0.tar.gz"]
    assert all(name in said for name in broken)
    assert {row["name"] for row in manifest["documents"]} == {"alpha"}


def test_two_versions_of_a_package_do_not_overwrite_each_other(wheels: Path) -> None:
    wheel(wheels, "alpha", {"a.md": prose("old", 40)}, "1.0")
    wheel(wheels, "alpha", {"a.md": prose("new", 40)}, "2.0")
    manifest, _, _ = run(wheels.parent, *TINY)
    files = [row["file"] for row in manifest["documents"]]
    assert len(files) == len(set(files)) == len(list((wheels.parent / "out/documents").glob("*.txt")))
    assert {row["version"] for row in manifest["documents"]} == {"1.0", "2.0"}


def test_at_most_so_many_documents_of_a_package(wheels: Path) -> None:
    wheel(wheels, "alpha", {"a.md": prose("guides", 200)})
    assert len(run(wheels.parent, *TINY, "source.per_package=2")[0]["documents"]) == 2


def test_nothing_usable_is_said(wheels: Path) -> None:
    wheel(wheels, "alpha", {"a.md": prose("guides", 3)})
    done = in_process("prepare", "source=packages", "source.path=wheels/*", *TINY, "output_dir=out", cwd=wheels.parent)
    assert done.returncode == 2
    assert "none has source.min_tokens=8000 of documentation" in done.stderr
    assert not (wheels.parent / "out/documents").exists()


def test_a_package_cannot_choose_where_it_is_written(wheels: Path) -> None:
    for n, name in enumerate(("../../evil", "a/b", "")):
        path = wheel(wheels, f"p{n}", {"a.md": prose(f"topic {n}", 40)})
        metadata = f"Name: {name}\nVersion: 1\n\n" if name else ""
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.md", prose(f"topic {n}", 40))
            archive.writestr(f"p{n}-1.0.dist-info/METADATA", metadata)
    manifest, _, said = run(wheels.parent, *TINY)
    texts = {file.relative_to(wheels.parent) for file in wheels.parent.rglob("*.txt")}
    assert texts == {Path("out/documents") / row["file"] for row in manifest["documents"]}
    assert {row["name"] for row in manifest["documents"]} == {"../../evil", "a/b", "p2"}
    assert {row["licence"] for row in manifest["documents"]} == {"unknown"}
    assert all(f"p{n}-1.0-py3-none-any.whl: its metadata tell no licence" in said for n in range(3))


def test_half_characters_that_code_writes_end_nothing(wheels: Path) -> None:
    wheel(wheels, "alpha", {"a.py": '"""\\ud800 ' + prose("codes", 40) + '"""\n', "b.md": prose("guides", 40)})
    manifest, dropped, _ = run(wheels.parent, *TINY)
    text = "".join((wheels.parent / "out/documents" / row["file"]).read_text() for row in manifest["documents"])
    joined = "".join(text.split())  # a document may end within a paragraph
    assert "?Oncodes,part0:" in joined
    assert "Onguides,part0:" in joined
    assert not [row for row in dropped if row["reason"] == "unreadable"]
