"""Rows equal the reference's, id for id and label for label, wherever the reference is right; docs/differences.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longalign.config import compose_config
from longalign.data.messages import BadSample, conversation
from longalign.data.packing import next_fit
from longalign.data.template import IGNORE, Row, Template
from longalign.data.truncate import truncate
from longalign.model.load import load_tokenizer
from longalign.model.spm import chatglm_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
LLAMA = ("llama_legacy", "llama_nonlegacy")
FAMILIES = ("chatglm", *LLAMA)
# The reference marks answers with text of its own, and breaks where a user or an answer contains those marks.
BROKEN_BY_ITS_MARKERS = {54, 58}
TARGETLESS = ("filtered_no_target", "dropped_no_pair")


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / "tokenize" / name).read_text(encoding="utf-8").splitlines()]


SAMPLES = {sample["id"]: sample for sample in lines("conversations.jsonl")}
RIGHT = json.loads((GOLDEN / "tokenize" / "where_reference_is_right.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    """Llama's as a command loads them: a folder with `tokenizer.model` and `legacy` in tokenizer_config.json."""
    chatglm = chatglm_tokenizer(GOLDEN / "chatglm_tokenizer" / "tokenizer.model")
    made = {"chatglm": Template("longalign-chatglm", chatglm)}
    for family in LLAMA:
        folder = tmp_path_factory.mktemp(family)
        shutil.copy(GOLDEN / "tokenize" / "llama_tokenizer.model", folder / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": family == "llama_legacy"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        config = compose_config("tokenize", [f"model.tokenizer={folder}"])
        made[family] = Template("longalign-llama", load_tokenizer(config))
    return made


def encode(sample: dict[str, Any], template: Template) -> Row:
    (row,) = template.rows(conversation(sample)[0])
    return truncate(row, 512, "right")


def check(sample: dict[str, Any], expected: dict[str, Any], template: Template) -> None:
    if expected["status"] in TARGETLESS:
        with pytest.raises(BadSample):
            encode(sample, template)
        return
    row = encode(sample, template)
    assert row.input_ids == expected["inputs"]
    assert row.labels == expected["labels"]


def cases(kind: str) -> list[Any]:
    """`nostrip`: every row with whitespace kept that the reference got through; `as_is`: where it is right itself."""
    chosen = []
    for family in FAMILIES:
        rows = lines(f"tokenised_{family}{'_nostrip' if kind == 'nostrip' else ''}.jsonl")
        quirks = RIGHT[family]["quirk_or_bug"]
        for row in rows:
            tags = quirks.get(str(row["id"]), {}).get("tags", [])
            ours_differs = row["id"] in BROKEN_BY_ITS_MARKERS or "literal_special_token_in_text" in tags
            wanted = not ours_differs if kind == "nostrip" else row["id"] in RIGHT[family]["reference_right"]
            if wanted and row["status"] != "crash":
                chosen.append(pytest.param(family, row, id=f"{family}-{row['id']}-{row['name']}"))
    return chosen


@pytest.mark.parametrize(("family", "expected"), cases("nostrip"))
def test_rows_with_whitespace_kept(family: str, expected: dict, templates: dict[str, Template]) -> None:
    check(SAMPLES[expected["id"]], expected, templates[family])


@pytest.mark.parametrize(("family", "expected"), cases("as_is"))
def test_rows_where_the_reference_is_right(family: str, expected: dict, templates: dict[str, Template]) -> None:
    check(SAMPLES[expected["id"]], expected, templates[family])


def test_enough_cases_are_compared() -> None:
    whole = [case for case in cases("nostrip") if case.values[1]["status"] in ("ok", "truncated")]
    assert len(whole) >= 72
    assert len(cases("as_is")) >= 42
    inputs = [{row["id"]: row["inputs"] for row in lines(f"tokenised_{family}_nostrip.jsonl")} for family in LLAMA]
    assert sum(inputs[0][number] != inputs[1][number] for number in inputs[0]) > 20, "the two kinds are told apart"


# -- where the reference is wrong: one test for each line of docs/differences.md about rows ----------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", sorted(BROKEN_BY_ITS_MARKERS))
def test_marker_text_is_ordinary_text(family: str, number: int, templates: dict[str, Template]) -> None:
    row = encode(SAMPLES[number], templates[family])
    decode = templates[family].tokenizer.decode
    user, answer = (message["content"] for message in SAMPLES[number]["messages"])
    assert user in decode(row.input_ids)
    assert decode([label for label in row.labels if label != IGNORE][:-1]).strip() == answer


def test_none_is_an_empty_answer(templates: dict[str, Template]) -> None:
    for template in templates.values():
        with pytest.raises(BadSample, match="no target"):
            encode(SAMPLES[18], template)


def test_an_exact_fit_stays(templates: dict[str, Template]) -> None:
    row = encode(SAMPLES[62], templates["chatglm"])
    assert len(row.input_ids) == 512
    assert row.labels[-1] == templates["chatglm"].tokenizer.eos_token_id, "not cut"


@pytest.mark.parametrize("family", LLAMA)
def test_a_special_token_that_a_user_wrote_is_text(family: str, templates: dict[str, Template]) -> None:
    template = templates[family]
    row = encode(SAMPLES[50], template)
    assert "what is </s> for?" in template.tokenizer.decode(row.input_ids)
    assert row.input_ids.count(template.tokenizer.eos_token_id) == 1, "the one that ends the row"


def test_next_fit_loses_nothing_and_fills_exactly() -> None:
    golden = json.loads((GOLDEN / "tokenize" / "synthetic_rows.json").read_text(encoding="utf-8"))
    packs = next_fit(np.array(golden["lengths"]), golden["max_length"], np.arange(len(golden["lengths"])))
    ours = [packs.samples[a:b].tolist() for a, b in zip(packs.offsets[:-1], packs.offsets[1:], strict=True)]
    assert ours == [pack["rows"] for pack in golden["corrected_not_reference"]["packs"]]
