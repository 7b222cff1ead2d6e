"""What is kept between turns changes nothing: answers equal those of plain transformers without any cache of ours."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from longalign.chat import local
from longalign.chat.local import LocalModel
from longalign.config import compose_config
from longalign.data.messages import Messages
from longalign.errors import UserError
from tests.conftest import WORDS, make_model

TEMPLATES = Path(__file__).parent.parent / "fixtures" / "chat_templates"
NEW = 12


def model_of(folder: Path, template: str = "longalign-llama") -> LocalModel:
    words = ["model=hf", f"model.path={folder}", f"template={template}", "cluster=cpu", f"max_new_tokens={NEW}"]
    return LocalModel(compose_config("chat", words))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return model_of(make_model(tmp_path_factory.mktemp("llama"), max_position_embeddings=4096))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    """A model whose template leaves out the thoughts of earlier turns."""
    folder = make_model(tmp_path_factory.mktemp("qwen3"), max_position_embeddings=4096, vocab_size=600)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(folder)
    return model_of(folder, "chat_template")


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    """A model that sees 16 tokens back, whose cache forgets the others and so cannot be cropped."""
    folder = make_model(tmp_path_factory.mktemp("mistral"))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=579, num_key_value_heads=2, sliding_window=16, **shape)
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)
    return model_of(folder)


def said(model: LocalModel, messages: Messages) -> tuple[str, int]:
    """The answer and how many tokens were kept."""
    pieces: list[str] = []
    told = model.answer(messages, pieces.append)
    assert told.kept is not None
    assert told.prompt == len(model.prompt_ids(messages))
    return "".join(pieces), told.kept


def plain(model: LocalModel, messages: Messages) -> str:
    generator = model.generator
    prompt = generator.prompt_ids(messages)
    return generator.decode(generator.generate([prompt], NEW)[0])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def check_cache(model: LocalModel) -> None:
    """Keys and values are those of one fresh pass over the same ids."""
    with torch.inference_mode():
        fresh = model.generator.model(torch.tensor([model.fed]), use_cache=True).past_key_values
    assert model.cache.get_seq_length() == len(model.fed)
    for ours, theirs in zip(model.cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)


DOCUMENT = " ".join(WORDS[(i * i) % len(WORDS)] for i in range(300))


def test_turns(llama: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are equal, and of the second question on only what is new is read."""
    monkeypatch.setattr(local, "PREFILL", 100)
    llama.forget()
    messages: Messages = []
    seen: set[str] = set()
    for turn, question in enumerate([DOCUMENT + "\n\nwhat is near", "the mill", "what keeps amber", "is it golden"]):
        messages.append(user(question))
        before = len(llama.fed)
        answer, kept = said(llama, messages)
        assert answer == plain(llama, messages)
        check_cache(llama)
        assert kept >= before - NEW if turn else kept == 0
        messages.append(assistant(answer))
        seen.add(answer)
    assert len(seen) > 1


def test_turns_taken_back_and_asked_again(llama: LocalModel) -> None:
    first = [user(DOCUMENT + "\n\nwhat is near")]
    llama.forget()
    answer, _ = said(llama, first)
    longer = [*first, assistant(answer), user("the mill")]
    assert said(llama, longer)[0] == plain(llama, longer)
    other = [*first, assistant(answer), user("a falcon")]
    assert said(llama, other)[0] == plain(llama, other)
    again, kept = said(llama, first)
    assert again == answer
    assert kept == len(llama.prompt_ids(first)) - 1, "all but the token that the answer begins from"
    check_cache(llama)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_any_order_of_conversations(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was asked before, an answer depends on its own conversation alone."""
    model: LocalModel = request.getfixturevalue(name)
    monkeypatch.setattr(local, "PREFILL", 7)
    rng = random.Random(0)
    phrase = lambda n: " ".join(rng.choices(WORDS, k=n))
    messages: Messages = []
    kept_some = 0
    for _ in range(14):
        if messages and rng.random() < 0.4:  # back by some turns
            messages = messages[: 2 * rng.randrange(len(messages) // 2 + 1)]
        messages = [*messages, user(phrase(rng.randrange(1, 30)))]
        answer, kept = said(model, messages)
        assert answer == plain(model, messages)
        kept_some += kept > 0
        # what the history tells may be what was said, a part of it, or something else
        told = rng.choice([answer, answer[: len(answer) // 2], f"<think>\n{phrase(4)}\n</think>\n\n{phrase(2)}"])
        messages.append(assistant(told))
    assert kept_some >= (1 if name == "mistral" else 4)


def test_a_template_that_rewrites_earlier_turns(qwen3: LocalModel) -> None:
    qwen3.forget()
    first = [user(DOCUMENT)]
    said(qwen3, first)
    thought = [*first, assistant("<think>\nnear the mill\n</think>\n\namber"), user("what is")]
    assert "near the mill" not in qwen3.generator.tokenizer.decode(qwen3.prompt_ids(thought)), "the template drops it"
    answer, kept = said(qwen3, thought)
    assert answer == plain(qwen3, thought)
    assert kept > len(qwen3.prompt_ids(first)) // 2, "the document is kept"


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_answer_stopped_in_the_middle(llama: LocalModel) -> None:
    llama.forget()
    first = [user(DOCUMENT)]
    whole = plain(llama, first)
    pieces: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llama.answer(first, lambda piece: (pieces.append(piece), press() if len(pieces) == 4 else None))
    assert signal.getsignal(signal.SIGINT) is before
    part = "".join(pieces)
    assert whole.startswith(part)
    assert 0 < len(part) < len(whole)
    check_cache(llama)
    then = [*first, assistant(part), user("the mill")]
    answer, kept = said(llama, then)
    assert answer == plain(llama, then)
    assert kept >= len(llama.prompt_ids(first))


@pytest.mark.parametrize("presses", [1, 2])
def test_stopped_while_it_reads(presses: int, llama: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One Ctrl-C waits for the piece that is being read and keeps it; a second one does not wait and keeps nothing."""
    monkeypatch.setattr(local, "PREFILL", 64)
    llama.forget()
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        for _ in range(presses if calls == 2 else 0):
            press()

    first = [user(DOCUMENT)]
    last_layer = llama.generator.model.model.layers[-1]  # the first has grown its cache by then
    handle = last_layer.register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        llama.answer(first, print)
    handle.remove()
    answer, kept = said(llama, first)
    assert answer == plain(llama, first)
    assert kept == (128 if presses == 1 else 0)


def test_over_the_context(llama: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    llama.forget()
    said(llama, [user("what")])
    fed = llama.fed
    over = [user("river " * 4096)]
    n = len(llama.generator.prompt_ids(over))
    for call in (lambda: llama.answer(over, print), lambda: llama.count(over)):
        with pytest.raises(UserError, match=rf"{n:,} tokens and max_new_tokens=12, .*context is 4,096; shorten"):
            call()
    assert llama.fed == fed
    monkeypatch.setattr(llama, "context", llama.count([user("what")]) + NEW)
    assert said(llama, [user("what")])[0], "exactly full"
    monkeypatch.setattr(llama, "context", llama.context - 1)
    with pytest.raises(UserError, match="context"):
        llama.count([user("what")])


def test_memory_that_runs_out(llama: LocalModel) -> None:
    llama.forget()
    first = [user(DOCUMENT)]

    def hook(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    handle = llama.generator.model.model.layers[-1].register_forward_pre_hook(hook)
    with pytest.raises(torch.OutOfMemoryError):
        llama.answer(first, print)
    handle.remove()
    assert said(llama, first) == (plain(llama, first), 0)
