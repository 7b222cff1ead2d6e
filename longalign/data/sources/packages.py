"""Documentation that Python packages carry -> documents of wanted lengths, as text files.

1. read     wheels (.whl) and source archives (.tar.gz, .zip): prose (.rst .md .txt) and the docstrings of .py files
2. choose   tests and licences are not looked at; tables, short files and those that mostly repeat others are left out
3. join     the texts of a package, file by file, into documents of min_tokens to max_tokens at paragraph borders
4. write    documents/PACKAGE-0001.txt, then documents.json: package, version, licence, tokens

What is left out, and why, stands in documents_dropped.jsonl: archives, files, and a package's last, too short document.
"""

from __future__ import annotations

import ast
import contextlib
import email
import hashlib
import json
import random
import re
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from longalign.data.documents import Unreadable, decode, paragraphs
from longalign.data.messages import expand
from longalign.errors import UserError
from longalign.files import check_free, disk_errors, fresh_folder, versions, whole_file, write_json, write_text
from longalign.model.load import load_tokenizer
from longalign.progress import Bar, warn
from longalign.schema import Config, Packages

ARCHIVES = (".whl", ".tar.gz", ".zip")
PROSE = (".rst", ".md", ".txt")
NOT_DOCUMENTATION = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|third_party|node_modules|locale|[^/]*\.(dist-info|egg-info))/"
    r"|(^|/)(test_|conftest|licen[cs]e|copying|notice|authors|requirements|top_level|cmakelists|sources\.txt)[^/]*$",
    re.IGNORECASE,
)
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError, ValueError, RuntimeError)
LEAST = 400  # characters of a file's text
WORDS = 0.6  # of a text's characters are letters or spaces, at least
AGAIN = 0.5  # of a file's text may stand in files before it, at most


class Package(NamedTuple):
    name: str
    version: str
    licence: str  # as its metadata tell it, an SPDX expression in newer ones

    @classmethod
    def of(cls, archive: Path, metadata: str) -> Package:
        told = email.message_from_string(metadata)
        classifiers = [c.rpartition(" :: ")[2] for c in told.get_all("Classifier", []) if c.startswith("License ::")]
        short = (told.get("License") or "").strip()
        short = short if "\n" not in short and len(short) < 80 else ""
        licence = told.get("License-Expression") or short or ", ".join(classifiers) or "unknown"
        return cls(told.get("Name") or archive.name.partition("-")[0], told.get("Version") or "", licence)

    @property
    def stem(self) -> str:
        """Of file names."""
        return re.sub(r"[^a-z0-9_-]+", "-", self.name.lower())


def describe(config: Config, source: Packages) -> list[str]:
    """What would be read and written. Raises UserError if there is nothing to read."""
    folder = outputs(config)
    return [*(f"read {file}" for file in expand(source.path, "source.path", ARCHIVES)), f"write {folder}"]


def outputs(config: Config) -> Path:
    """Raises UserError if something is in the way."""
    folder = Path(config.output_dir or "") / "documents"
    check_free(folder, ("*.txt",), config.overwrite)
    return folder


def prepare(config: Config, source: Packages) -> list[str]:
    """Run the source; returns what to tell. Raises UserError for missing files, files in the way, nothing usable."""
    archives, folder = expand(source.path, "source.path", ARCHIVES), outputs(config)
    tokenizer = load_tokenizer(config)
    count = lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    seen: set[str] = set()
    written: list[dict[str, Any]] = []
    with (
        fresh_folder(folder, ("*.txt",), config.overwrite) as partial,
        whole_file(folder.with_name("documents_dropped.jsonl")) as left_out,
        Bar("prepare", len(archives), "packages") as bar,
    ):
        reasons, numbers = Counter[str](), Counter[str]()

        def leave_out(what: str, reason: str, **more: int) -> None:
            reasons[reason] += 1
            left_out.write(json.dumps({"file": what, "reason": reason, **more}) + "\n")

        for archive in archives:
            bar.advance(1, note=archive.name)
            try:
                package, files = read(archive)
            except (*BROKEN, OSError) as error:
                warn(f"{archive}: left out: {error}")
                leave_out(str(archive), "unreadable archive")
                continue
            texts: list[str] = []
            for file, data in files:
                text, reason = text_of(file, data, seen)
                if reason:
                    leave_out(f"{archive}:{file}", reason)
                else:
                    texts.append(text)
            rng = random.Random(f"packages {config.seed} {package.name} {package.version}")
            made, rest = join(texts, source, count, rng)
            if made and package.licence == "unknown":
                warn(f"{archive}: its metadata tell no licence; read it before you pass its documents on")
            if rest:
                leave_out(str(archive), "rest below min_tokens", tokens=rest)
            for document, tokens in made:
                numbers[package.stem] += 1  # a package may come in two versions
                name = f"{package.stem}-{numbers[package.stem]:04d}.txt"
                write_text(partial / name, document)
                digest = hashlib.sha256(document.encode()).hexdigest()
                written.append({"file": name, **package._asdict(), "tokens": tokens, "sha256": digest})
        if not written:
            raise UserError(
                f"source.path={source.path}: none has source.min_tokens={source.min_tokens} of documentation"
            )
    manifest = {
        "source": source.model_dump(),
        "seed": config.seed,
        "documents": written,
        "left_out": dict(reasons),
        "versions": versions(),
    }
    with disk_errors(folder, "output_dir"):
        write_json(folder.with_name("documents.json"), manifest)
    tokens = sum(row["tokens"] for row in written)
    told = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
    return [f"{folder}: {len(written):,} documents, {tokens:,} tokens", f"left out: {told or 'nothing'}"]


# -- what a package holds ----------------------------------------------------------------------------------


def read(archive: Path) -> tuple[Package, list[tuple[str, bytes]]]:
    """The package, and its files that may be documentation, by name. Raises BROKEN or OSError."""
    with contextlib.ExitStack() as stack:
        if archive.name.endswith(".tar.gz"):
            tar = stack.enter_context(tarfile.open(archive))
            names = [member.name for member in tar.getmembers() if member.isfile()]

            def get(name: str) -> bytes:
                file = tar.extractfile(name)
                return file.read() if file else b""
        else:
            zipped = stack.enter_context(zipfile.ZipFile(archive))
            names, get = zipped.namelist(), zipped.read
        tells = [name for name in names if re.fullmatch(r"[^/]+(\.dist-info/METADATA|/PKG-INFO)", name)]
        package = Package.of(archive, get(min(tells, key=len)).decode("utf-8", "replace") if tells else "")
        kept = [name for name in sorted(names) if name.endswith((*PROSE, ".py")) and not NOT_DOCUMENTATION.search(name)]
        return package, [(name, get(name)) for name in kept]


def text_of(file: str, data: bytes, seen: set[str]) -> tuple[str, str | None]:
    """The documentation in a file, and why it is left out. seen: digests of the paragraphs before, which it adds to."""
    try:
        text = docstrings(file, decode(data)) if file.endswith(".py") else decode(data).replace("\r\n", "\n").strip()
    except (Unreadable, SyntaxError, ValueError, RecursionError):
        return "", "unreadable"
    text = text.replace("\0", "").encode(errors="replace").decode()  # code may write NUL, or half of a character
    if len(text) < LEAST:
        return "", "short"
    if sum(c.isalpha() or c == " " for c in text) < WORDS * len(text):
        return "", "no prose"
    parts = {hashlib.md5(part.strip().encode()).hexdigest(): len(part) for part in text.split("\n\n") if part.strip()}
    again = sum(length for digest, length in parts.items() if digest in seen)
    seen.update(parts)
    if again > AGAIN * sum(parts.values()):
        return "", "repeats others"
    return text, None


def docstrings(file: str, code: str) -> str:
    """The docstrings of a module, its classes and functions, under their names and arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in strings
        tree = ast.parse(code)
    name = ".".join(PurePosixPath(file).with_suffix("").parts).removesuffix(".__init__")
    parts = [f"{name}\n{'=' * len(name)}", ast.get_docstring(tree) or ""]

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            if text := ast.get_docstring(child):
                parts.append(f"{prefix}{child.name}{arguments}\n\n{text}")
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")

    visit(tree, "")
    return "\n\n".join(part for part in parts if part) if len(parts) > 2 or parts[1] else ""


def join(texts: list[str], source: Packages, count: Any, rng: random.Random) -> tuple[list[tuple[str, int]], int]:
    """Documents of lengths drawn evenly between min_tokens and max_tokens, in order; and the tokens of a shorter rest.

    No more than source.per_package: what comes behind is not counted.
    """
    made: list[tuple[str, int]] = []
    parts: list[str] = []
    have, wanted = 0, rng.randint(source.min_tokens, source.max_tokens)
    longest = source.min_tokens // 16  # of a paragraph, so that lengths are near to those drawn
    for part, tokens in chain.from_iterable(paragraphs(f"{text}\n\n\n", longest, count) for text in texts):
        if have + tokens > wanted:
            made.append(("".join(parts).strip(), have))
            parts, have, wanted = [], 0, rng.randint(source.min_tokens, source.max_tokens)
        if len(made) == source.per_package:
            return made, 0
        parts.append(part)
        have += tokens
    return ([*made, ("".join(parts).strip(), have)], 0) if have >= source.min_tokens else (made, have)
