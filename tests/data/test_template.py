"""Where targets stand, what truncation cuts, and that asking uses the ids of training."""

from __future__ import annotations

import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from longalign.data import jinja
from longalign.data.messages import BadSample, Messages
from longalign.data.template import IGNORE, Row, Template
from longalign.data.truncate import MARGIN, truncate
from longalign.errors import UserError
from tests.conftest import TINY, WORDS

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Shows only the last answer's thoughts, as reasoning models do: earlier turns change when a turn is added.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{{ m['content'] if m['role'] == 'user' or loop.last else m['content'].split('|')[-1] }}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokenizer(template: str | None = None):
    made = AutoTokenizer.from_pretrained(TINY)
    if template:
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template = template
    return made


def templates() -> list[Template]:
    return [
        Template("longalign-llama", tokenizer()),
        Template("longalign-chatglm", tokenizer()),
        Template("chat_template", tokenizer(CHATML)),
    ]


def random_conversation(rng: random.Random, rounds: int, system: bool) -> Messages:
    text = lambda low: " ".join(rng.choices([*WORDS, "\n\n", "é", "[INST]"], k=rng.randint(low, 6)))
    messages = [{"role": "system", "content": text(1)}] if system else []
    for _ in range(rounds):
        messages += [{"role": "user", "content": text(1)}, {"role": "assistant", "content": text(1)}]
    return messages


def test_llama_layout_spelled_out() -> None:
    made = tokenizer()
    ids = lambda text: made(text, add_special_tokens=False)["input_ids"]
    bos, eos = made.bos_token_id, made.eos_token_id
    q1, a1, q2, a2 = ids("[INST]what[/INST]"), ids("the river"), ids("\n\n[INST]is[/INST]"), ids("golden")
    messages = [
        {"role": r, "content": c}
        for r, c in zip(["user", "assistant"] * 2, ["what", "the river", "is", "golden"], strict=True)
    ]
    (row,) = Template("longalign-llama", made).rows(messages)
    assert row.input_ids == [bos, *q1, *a1, *q2, *a2, eos]
    assert row.labels == [IGNORE] * (1 + len(q1)) + a1 + [eos] + [IGNORE] * (len(q2) - 1) + a2 + [eos]


def test_empty_answer_has_no_target_and_no_eos_label() -> None:
    template = Template("longalign-llama", tokenizer())
    said = lambda *answers: [
        {"role": r, "content": c} for a in answers for r, c in (("user", "what"), ("assistant", a))
    ]
    with pytest.raises(BadSample, match="no target"):
        template.rows(said("", ""))
    (row,) = template.rows(said("", "river"))
    assert row.n_target == len(template.tokenizer("river", add_special_tokens=False)["input_ids"]) + 1


@pytest.mark.parametrize("template", templates(), ids=lambda t: t.name)
def test_asking_uses_the_ids_of_training(template: Template) -> None:
    """For every round: the prompt's ids are the row's ids up to that round's answer, and the answer comes next."""
    rng = random.Random(0)
    for number in range(40):
        messages = random_conversation(rng, rng.randint(1, 4), system=number % 2 == 0)
        (row,) = template.rows(messages)
        assert len(row.input_ids) == len(row.labels)
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = template.prompt_ids(messages[:place])
            assert row.input_ids[: len(prompt)] == prompt
            answer = template.tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            assert row.labels[len(prompt) : len(prompt) + len(answer)] == answer
            assert row.labels[len(prompt) + len(answer)] in template.stop_ids, "the model learns to stop"


def test_templates_that_rewrite_history_train_one_row_per_answer() -> None:
    template = Template("chat_template", tokenizer(FORGETFUL))
    messages = [
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": "quiet|river"},
        {"role": "user", "content": "is"},
        {"role": "assistant", "content": "near|mill"},
    ]
    rows = template.rows(messages)
    assert len(rows) == 2
    decode = template.tokenizer.decode
    for row, answer in zip(rows, ("quiet|river<|im_end|>", "near|mill<|im_end|>"), strict=True):
        assert decode([i for i in row.labels if i != IGNORE]) == answer
    assert "quiet" not in decode(rows[1].input_ids)
    prompt = template.prompt_ids(messages[:3])
    assert rows[1].input_ids[: len(prompt)] == prompt


def test_templates_without_an_end_of_turn_get_eos() -> None:
    """GLM-4's kind: nothing follows an answer but the next role, so the model would never learn to stop."""
    bare = CHATML.replace("+ '<|im_end|>' + '\\n' }}", "}}")
    assert bare != CHATML
    template = Template("chat_template", tokenizer(bare))
    messages = [
        {"role": r, "content": c}
        for r, c in zip(["user", "assistant"] * 2, ["what", "river", "is", "golden"], strict=True)
    ]
    (row,) = template.rows(messages)
    eos = template.tokenizer.eos_token_id
    assert row.labels.count(eos) == 2
    assert template.stop_ids == [eos]


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(UserError, match="choose template=longalign-llama"):
        Template("chat_template", tokenizer())


def test_exported_jinja_renders_the_same_text() -> None:
    made = tokenizer()
    made.chat_template = jinja.LLAMA
    rng = random.Random(1)
    for number in range(20):
        messages = random_conversation(rng, rng.randint(1, 3), system=number % 2 == 0)
        (row,) = Template("longalign-llama", made).rows(messages)
        text = made.apply_chat_template(messages, tokenize=False)
        assert text == made.decode(row.input_ids)


def row_of(*stretches: tuple[int, bool]) -> Row:
    ids, labels = [], []
    for length, is_target in stretches:
        new = list(range(len(ids) + 1, len(ids) + 1 + length))
        ids += new
        labels += new if is_target else [IGNORE] * length
    return Row(np.array(ids, np.int32), np.array(labels, np.int32))


def test_truncation() -> None:
    row = row_of((50, False), (5, True), (10, False), (5, True))
    assert truncate(row, 70, "right") is row, "an exact fit is not cut"
    cut = truncate(row, 52, "right")
    assert (cut.input_ids, cut.labels) == (row.input_ids[:52], row.labels[:52])
    with pytest.raises(BadSample, match="no target left"):
        truncate(row, 50, "right")
    for how in ("drop", "error"):
        with pytest.raises(BadSample, match="too long"):
            truncate(row, 69, how)


def test_truncation_in_the_middle() -> None:
    """The cut lies inside the longest stretch without targets, and leaves its head and tail: the question."""
    row = row_of((1000, False), (5, True), (300, False), (5, True))
    assert truncate(row, 1310, "middle") is row, "an exact fit is not cut"
    middle = truncate(row, 710, "middle")
    assert middle.input_ids == [*range(1, 201), *range(801, 1311)]
    assert middle.n_target == 10
    least = 1310 - (1000 - 2 * MARGIN)
    assert truncate(row, least, "middle").input_ids[: 2 * MARGIN] == [*range(1, 65), *range(937, 1001)]
    # no single stretch is long enough: nothing better is left than the paper's way
    assert truncate(row_of((100, False), (5, True), (90, False), (50, True)), 150, "middle").input_ids == [
        *range(1, 151)
    ]
    with pytest.raises(BadSample, match="no target left"):
        truncate(row_of((100, False), (5, True)), 50, "middle")
