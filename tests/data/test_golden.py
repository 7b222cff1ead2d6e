"""Llama rows equal the reference's, id for id and label for label, for both kinds of Llama tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from longalign.config import compose_config
from longalign.data.messages import BadSample, conversation
from longalign.data.template import Template, truncate
from longalign.model.load import load_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenize"
# The reference marks answers with text of its own, and breaks where a user or an answer contains those marks.
BROKEN_BY_ITS_MARKERS = {54, 58}


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


CASES = {
    kind: list(zip(lines("conversations.jsonl"), lines(f"tokenised_llama_{kind}_nostrip.jsonl"), strict=True))
    for kind in ("legacy", "nonlegacy")
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    """As a command loads them: a folder with `tokenizer.model`, `legacy` in tokenizer_config.json, nothing else."""
    made = {}
    for kind in CASES:
        folder = tmp_path_factory.mktemp(kind)
        shutil.copy(GOLDEN / "llama_tokenizer.model", folder / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": kind == "legacy"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        config = compose_config("tokenize", [f"model.tokenizer={folder}"])
        made[kind] = Template("longalign-llama", load_tokenizer(config))
    return made


@pytest.mark.parametrize(
    ("kind", "sample", "expected"),
    [(kind, *case) for kind, cases in CASES.items() for case in cases],
    ids=[f"{kind}-{c['id']}-{c['name']}" for kind, cases in CASES.items() for c, _ in cases],
)
def test_llama_rows(kind: str, sample: dict, expected: dict, templates: dict[str, Template]) -> None:
    template = templates[kind]
    assert sample["id"] == expected["id"]
    if sample["id"] in BROKEN_BY_ITS_MARKERS:
        (row,) = template.rows(conversation(sample))
        answer = sample["messages"][-1]["content"]
        prefix = " " if kind == "legacy" else ""
        assert template.tokenizer.decode(row.input_ids[:-1]).endswith(prefix + answer)
        return
    if expected["status"] not in ("ok", "truncated"):
        with pytest.raises(BadSample):
            truncate(template.rows(conversation(sample))[0], 512, "right")
        return
    (row,) = template.rows(conversation(sample))
    row = truncate(row, 512, "right")
    assert row.input_ids == expected["inputs"]
    assert row.labels == expected["labels"]


def test_enough_cases_are_compared() -> None:
    for cases in CASES.values():
        assert sum(expected["status"] in ("ok", "truncated") for _, expected in cases) >= 24
    different = [a["inputs"] != b["inputs"] for (_, a), (_, b) in zip(*CASES.values(), strict=True)]
    assert sum(different) > 20, "the two kinds are told apart"
