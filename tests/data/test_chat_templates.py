"""The chat templates of real models: what is learnt, and that asking uses the ids of training."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from longalign.data.messages import Messages
from longalign.data.template import IGNORE, Row, Template
from tests.conftest import TINY, WORDS

FOLDER = Path(__file__).parent.parent / "fixtures" / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
END = {"llama3": "<|eot_id|>", "llama3_2": "<|eot_id|>", "gptoss": "<|return|>", "phi3": "<|end|>"}
END |= dict.fromkeys(("chatml", "qwen2_5", "qwen3"), "<|im_end|>") | dict.fromkeys(("gemma", "gemma3"), "<end_of_turn>")
REWRITING = {"qwen3", "gptoss"}  # earlier turns change when a turn is added


def template(name: str, **arguments: Any) -> Template:
    """A real model's chat template over the bundled tokenizer, which gets the template's special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    jinja = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    special = set(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>", jinja)) | set(END.values())
    special |= {"<|user|>", "<|assistant|>", "<|system|>"}  # in some put together from the role
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    tokenizer.chat_template = jinja
    return Template("chat_template", tokenizer, arguments)


def said(*texts: str, system: str | None = None) -> Messages:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def text_of(made: Template, row: Row) -> tuple[str, str]:
    """(the row, its targets) as text."""
    decode = made.tokenizer.decode
    return decode(row.input_ids), decode([label for label in row.labels if label != IGNORE])


THOUGHT = "<think>\nhm\n</think>\n\n"
EXPECTED = {  # of said("q", "a", "r", THOUGHT + "b", system="s"): each row's text and its targets
    "chatml": [
        (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
            f"<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{THOUGHT}b<|im_end|>",
            f"a<|im_end|>{THOUGHT}b<|im_end|>",
        )
    ],
    "llama3": [
        (
            "<s><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user"
            f"<|end_header_id|>\n\nr<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{THOUGHT}b<|eot_id|>",
            f"a<|eot_id|>{THOUGHT}b<|eot_id|>",
        )
    ],
    "mistral_v1": [
        (f"<s> [INST] s\n\nq [/INST] a</s> [INST] r [/INST] {THOUGHT}b</s>", f" a</s> {THOUGHT}b</s>"),
    ],
    # Its place for a system message is the last question, and none once that is answered: the first question then.
    "mistral_v2v3": [
        (f"<s>[INST] s\n\nq[/INST] a</s>[INST] r[/INST] {THOUGHT}b</s>", f" a</s> {THOUGHT}b</s>"),
    ],
    # Nothing ends an answer but the next role: EOS does, as a label only where the next role's token stands.
    "glm4": [
        (
            f"[gMASK]<sop><|system|>\ns<|user|>\nq<|assistant|>\na<|user|>\nr<|assistant|>\n{THOUGHT}b</s>",
            f"\na</s>\n{THOUGHT}b</s>",
        )
    ],
    "gemma": [  # refuses a system role
        (
            "<s><start_of_turn>user\ns\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
            f"<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n{THOUGHT}b<end_of_turn>",
            f"a<end_of_turn>{THOUGHT}b<end_of_turn>",
        )
    ],
    "qwen3": [  # writes an empty thought before the last answer and removes those of earlier ones
        (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\na<|im_end|>",
            "<think>\n\n</think>\n\na<|im_end|>",
        ),
        (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
            f"<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{THOUGHT}b<|im_end|>",
            f"{THOUGHT}b<|im_end|>",
        ),
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_spelled_out(name: str) -> None:
    made = template(name)
    rows = made.rows(said("q", "a", "r", THOUGHT + "b", system="s"))
    assert [text_of(made, row) for row in rows] == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_asking_uses_the_ids_of_training(name: str) -> None:
    """For every answer some row begins with the prompt's very ids, and what it learns next is that answer and a stop."""
    made, rng = template(name), random.Random(0)
    people_write = [*WORDS, "\n\n", "é", "[INST]", "</s>", "<|im_end|>", "<|user|>", "<end_of_turn>", "<|eot_id|>"]
    text = lambda: " ".join([rng.choice(WORDS), *rng.choices(people_write, k=rng.randint(0, 6)), rng.choice(WORDS)])
    for number in range(25):
        texts = [text() for _ in range(2 * rng.randint(1, 4))]
        if number % 3 == 0:
            texts[-1] = f"<think>\n{text()}\n</think>\n\n{texts[-1]}"
        messages = said(*texts, system=text() if number % 2 else None)
        rows = made.rows(messages)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(rows) == (len(answers) if name in REWRITING else 1)
        for turn, place in enumerate(answers):
            prompt = made.prompt_ids(messages[:place])
            row = rows[turn if len(rows) > 1 else 0]
            assert row.input_ids[: len(prompt)] == prompt
            stop = next(i for i in range(len(prompt), len(row.labels)) if row.labels[i] in made.stop_ids)
            learnt = made.tokenizer.decode(row.labels[len(prompt) : stop])
            answer = messages[place]["content"].rpartition("</think>")[2].strip()
            assert learnt.endswith(answer)
            assert IGNORE not in row.labels[len(prompt) : stop + 1]


@pytest.mark.parametrize("name", NAMES)
def test_what_people_write_never_becomes_a_special_token(name: str) -> None:
    made = template(name)
    literals = " x ".join(str(t) for t in made.tokenizer.added_tokens_decoder.values() if t.special)
    count = lambda rows: sum(i in made.tokenizer.all_special_ids for row in rows for i in row.input_ids)
    harmless, harmful = said("q", "a", "q", "a"), said(literals, literals, literals, literals)
    assert count(made.rows(harmful)) == count(made.rows(harmless))
    (row, *_) = made.rows(harmful)
    assert literals in made.tokenizer.decode(row.input_ids), "and nothing of it is lost"


def test_a_date_does_not_make_tomorrows_prompt_another() -> None:
    for name, date in (("llama3_2", "26 Jul 2024"), ("gptoss", "2024-07-26")):
        made = template(name)
        assert date in made.tokenizer.decode(made.prompt_ids(said("q")))


def test_arguments_reach_the_template() -> None:
    made = template("qwen3", enable_thinking=False)
    prompt = made.tokenizer.decode(made.prompt_ids(said("q")))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    (row,) = made.rows(said("q", "a"))
    assert text_of(made, row) == (prompt + "a<|im_end|>", "a<|im_end|>")
