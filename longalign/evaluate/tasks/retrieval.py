"""Finding, following and counting at a known length, in the manner of RULER (Hsieh et al., arXiv 2404.06654).

    single_key           a number stated of one key
    multi_key            the same among many other keys that have numbers
    multi_value          several numbers of one key
    multi_query          the numbers of several keys
    variable_tracking    the variables that have a value, through a chain of assignments among other chains
    aggregation          the words that stand most often in a list as long as the prompt

As in RULER the score is the share of the wanted strings that the answer has in it, so that reciting the document
scores; `exact` tells an answer from a recital, see score().
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, product
from pathlib import Path
from typing import Any, NamedTuple

from longalign.data.messages import Messages
from longalign.data.synthetic import ADJECTIVES, MATERIALS, NOUNS, WORDS
from longalign.errors import UserError
from longalign.evaluate.haystack import Hidden, document_of, sentences, tokens_within
from longalign.evaluate.prompts import fill, load_prompt
from longalign.evaluate.question import CountTokens, Question, Verdict
from longalign.evaluate.statistics import Row, breakdown, grid, mean, scores, standard_error
from longalign.schema import Retrieval

PREFIX = "task.retrieval"
KEYS = [" ".join(words) for words in product(ADJECTIVES, MATERIALS, NOUNS)]
LIST = sorted(set(WORDS))  # what aggregation's lists are made of
CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"  # a name without a vowel is no word
RATIO, LEAST = 10, 3  # wanted words stand so many times as often as others, and others about so often at least
OTHER_WORDS = 64  # that an exact answer may have besides the wanted ones: sentences, but no document

Source = Callable[[], Iterator[str]]


class Kind(NamedTuple):
    place: str  # what its prompt must hold besides {document}
    form: str  # of the strings it asks for, as a regular expression
    lower: str | None  # setting that makes it need less room


NUMBER = r"\d{7}"
KINDS = {
    "single_key": Kind("key", NUMBER, None),
    "multi_key": Kind("key", NUMBER, "keys"),
    "multi_value": Kind("key", NUMBER, "values"),
    "multi_query": Kind("keys", NUMBER, "queries"),
    "variable_tracking": Kind("value", f"[{CONSONANTS}]{{5}}", "chains or hops"),
    "aggregation": Kind("count", "|".join(LIST), "words"),
}


class Content(NamedTuple):
    """What a prompt is about, before it has a length."""

    wanted: list[str]
    asked: str  # what stands in Kind.place
    hidden: list[Hidden]  # those of the wanted strings first
    source: Source  # of what fills the document


def questions(settings: Retrieval, seed: int, count_tokens: CountTokens) -> list[Question]:
    """Every kind at every length. The kinds of a sample and length hide in the same sentences; haystacks take turns.

    Raises UserError if what is hidden does not fit a length.
    """
    prompts = {kind: _prompt(settings, kind, "document", KINDS[kind].place) for kind in settings.kinds}
    statement = _prompt(settings, "statement", "key", "value")
    assignment = _prompt(settings, "assignment", "name", "value")
    count = tokens_within(count_tokens)
    found: list[Question] = []
    for length, sample, kind in product(settings.lengths, range(settings.samples), settings.kinds):
        rng = random.Random(f"retrieval {seed} {length} {sample} {kind}")
        haystack = settings.haystack[sample % len(settings.haystack)] if settings.haystack else None
        source = functools.partial(sentences, f"{PREFIX}.haystack", haystack, f"retrieval {seed} {length} {sample}")
        told = functools.partial(ask, prompts[kind], KINDS[kind].place)
        if kind == "aggregation":
            content = common_words(settings.words, length - count_tokens(told("", "")), rng, count)
        elif kind == "variable_tracking":
            content = variables(settings, rng, assignment, source)
        else:
            content = numbers(kind, length, settings, rng, statement, source)
        document = content and document_of(
            length,
            content.hidden,
            content.source,
            count,
            functools.partial(_count, count_tokens, functools.partial(told, content.asked)),
        )
        if content is None or document is None:
            lower = f", or lower {PREFIX}.{KINDS[kind].lower}" if KINDS[kind].lower else ""
            raise UserError(f"{PREFIX}.lengths={length} has no room for what {kind} asks; raise it{lower}")
        about: dict[str, Any] = {"length": length, "kind": kind}
        if kind != "aggregation":
            about["depths"] = [round(depth, 4) for depth, _ in content.hidden[: len(content.wanted)]]
            about |= {"haystack": haystack} if haystack else {}
        messages, limit = told(content.asked, document), settings.max_new_tokens
        found.append(Question(f"{kind}/{length}/{sample}", messages, content.wanted, about, limit))
    return found


def ask(prompt: str, place: str, asked: str, document: str) -> Messages:
    return [{"role": "user", "content": fill(prompt, **{place: asked, "document": document})}]


def _count(count_tokens: CountTokens, told: Callable[[str], Messages], document: str) -> int:
    return count_tokens(told(document))


def _prompt(settings: Retrieval, name: str, *places: str) -> str:
    """The user's file, or the shipped one."""
    setting, own = f"{PREFIX}.prompts", settings.prompts
    if own and not Path(own).is_dir():
        raise UserError(f"{setting}={own} is no folder")
    file = Path(own) / f"{name}.txt" if own and (Path(own) / f"{name}.txt").is_file() else None
    return load_prompt(setting, f"retrieval/{name}.txt", file, places)


# -- what is hidden ---------------------------------------------------------------------------------------------


def numbers(kind: str, length: int, settings: Retrieval, rng: random.Random, statement: str, source: Source) -> Content:
    """Keys and their numbers of seven digits, at depths drawn uniformly; no key and no number stands twice."""
    asked = settings.queries if kind == "multi_query" else 1
    each = settings.values if kind == "multi_value" else 1
    others = (settings.keys or min(length, len(KEYS))) - 1 if kind == "multi_key" else 0
    keys = rng.sample(KEYS, asked + others)
    values = [str(number) for number in rng.sample(range(10**6, 10**7), asked * each + others)]
    owners = [key for key in keys[:asked] for _ in range(each)] + keys[asked:]
    state = lambda place: fill(statement, key=owners[place], value=values[place])
    n = asked * each
    if kind == "multi_key" and settings.keys is None:  # more than fit: the document is made of them
        hidden = [(rng.random(), state(0))]
        filling: Source = lambda: chain(map(state, range(n, len(values))), source())
    else:
        hidden, filling = [(rng.random(), state(place)) for place in range(len(values))], source
    told = ", ".join(f"the {key}" for key in keys[:asked]) if kind == "multi_query" else keys[0]
    return Content(values[:n], told, hidden, filling)


def variables(settings: Retrieval, rng: random.Random, assignment: str, source: Source) -> Content:
    """Chains X = 12345, Y = X, Z = Y, ... whose assignments stand in this order, those of several chains mixed."""
    per_chain = settings.hops + 1
    names: dict[str, None] = {}
    while len(names) < settings.chains * per_chain:
        names["".join(rng.choices(CONSONANTS, k=5))] = None
    values = [str(number) for number in rng.sample(range(10**4, 10**5), settings.chains)]
    links = [list(names)[n * per_chain : (n + 1) * per_chain] for n in range(settings.chains)]
    hidden: list[Hidden] = []
    for value, chained in zip(values, links, strict=True):
        depths = sorted(rng.random() for _ in chained)
        told = [fill(assignment, name=name, value=of) for name, of in zip(chained, [value, *chained], strict=False)]
        hidden += zip(depths, told, strict=True)
    return Content(links[0], values[0], hidden, source)


def common_words(n: int, room: int, rng: random.Random, count: Callable[[str], int]) -> Content | None:
    """A list of `room` tokens in which n words stand about RATIO times as often as each of the others.

    There are as many others as can stand LEAST times each; None if that is fewer than 2n. They come in rounds, each in
    an order of its own, so that they stand equally often.
    """
    words = rng.sample(LIST, len(LIST))
    wanted, others = words[:n], words[n:]
    cost = RATIO * sum(count(" " + word) for word in wanted)  # of the wanted words while each other one stands once
    costs = list(accumulate(count(" " + word) for word in others))
    n_others = sum(LEAST * (cost + so_far) <= room for so_far in costs)
    if n_others < 2 * n:
        return None
    others = others[:n_others]
    often = RATIO * room // (cost + costs[n_others - 1])
    hidden = [(rng.random(), word) for word in wanted for _ in range(often)]
    seed = rng.random()
    return Content(wanted, str(n), hidden, lambda: _rounds(others, random.Random(seed)))


def _rounds(words: list[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(words, len(words))


# -- scores -----------------------------------------------------------------------------------------------------


def score(question: Question, answer: str, verdicts: list[Verdict] | None) -> dict[str, float | None]:
    """score: the share of the wanted strings in the answer. exact: 1 for an answer, 0 for anything else, and that is:

    all wanted strings, no other of their form (a number of seven digits, a name of five consonants, a word of the
    lists), and not more than OTHER_WORDS further words.
    """
    wanted = {one.lower() for one in question.reference or []}
    named = set(occurrences(KINDS[question.about["kind"]].form, answer))
    brief = len(answer.split()) <= len(wanted) + OTHER_WORDS
    return {"score": mean([float(one in named) for one in sorted(wanted)]), "exact": float(named == wanted and brief)}


def occurrences(form: str, text: str) -> list[str]:
    """What has the form and is no part of a longer number or (English) word, in lower case."""
    return [one.lower() for one in re.findall(rf"(?<![a-z0-9])(?:{form})(?![a-z0-9])", text, re.IGNORECASE | re.ASCII)]


def summarise(rows: list[Row]) -> dict[str, Any]:
    """score, exact, breakdowns by kind and length, and the mean score[length][kind] as `grid`."""
    by = lambda key: breakdown(rows, lambda row: row["about"][key])
    return {
        "score": mean(scores(rows)),
        "standard_error": standard_error(scores(rows)),
        "best": 1,
        "exact": mean(scores(rows, "exact")),
        "by_kind": by("kind"),
        "by_length": by("length"),
        "grid_axes": ["prompt tokens", "kind"],
        "grid": grid(rows, "length", "kind"),
    }
