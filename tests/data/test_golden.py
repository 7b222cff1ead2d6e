"""Llama-2 rows equal the reference's, id for id and label for label."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaTokenizer

from longalign.data.messages import BadSample, conversation
from longalign.data.template import Template, truncate

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenize"
# The reference marks answers with text of its own, and breaks where a user or an answer contains those marks.
BROKEN_BY_ITS_MARKERS = {54, 58}


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(GOLDEN / "llama_tokenizer.model", folder / "tokenizer.model")
    return Template("longalign-llama", LlamaTokenizer.from_pretrained(folder, legacy=False))


CASES = list(zip(lines("conversations.jsonl"), lines("tokenised_llama_nonlegacy_nostrip.jsonl"), strict=True))


@pytest.mark.parametrize(("sample", "expected"), CASES, ids=[f"{c['id']}-{c['name']}" for c, _ in CASES])
def test_llama_rows(sample: dict, expected: dict, template: Template) -> None:
    assert sample["id"] == expected["id"]
    if sample["id"] in BROKEN_BY_ITS_MARKERS:
        (row,) = template.rows(conversation(sample))
        assert template.tokenizer.decode(row.input_ids[:-1]).endswith(sample["messages"][-1]["content"])
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
    assert sum(expected["status"] in ("ok", "truncated") for _, expected in CASES) >= 24
