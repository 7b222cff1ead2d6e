"""A small synthetic world: documents that hide facts, and conversations about them.

Everything here is plain English over a few hundred words and comes from a seed alone, so the same
call gives the same text on every machine. Three things are built from it: the training data of the
bundled `tiny` model, the data of the demo, and the haystacks of the retrieval evaluations.

Lengths are counted in tokens of the tiny tokenizer, in which every word of this world, every
punctuation mark and every paragraph break is one token; see `length`.
"""

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

Split = Literal["train", "test"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# a fact is about an attribute of an owner (adjective and noun); its value is a material and an object
ATTRIBUTES = _words("password nickname motto signal symbol secret")
ADJECTIVES = _words("""
    amber ancient brave bright calm clever crimson curious eager faded gentle golden hidden humble ivory
    lonely modest noble patient polite proud rusty silent silver solemn steady swift tired velvet weary wise
    young
""")
NOUNS = _words("""
    badger baker beaver captain carpenter clerk doctor falcon farmer fisher fox gardener goose heron hunter
    judge keeper knight lynx mason merchant miller nurse otter painter pilot poet potter raven sailor
    scholar shepherd singer sparrow student tailor teacher tiger weaver wolf
""")
MATERIALS = _words("""
    basalt birch bronze cedar chalk cherry clover cobalt copper coral cotton crystal ebony emerald granite
    hazel honey indigo iron jade juniper lemon linen maple marble olive opal pearl pepper pine plum walnut
""")
OBJECTS = _words("""
    anchor arrow basket bell bridge candle canyon chariot circle comet compass crown desert dragon feather
    forest garden glacier hammer harp helmet island ladder meadow mirror mountain needle ocean orchard
    pebble prairie ribbon river rocket saddle shadow shield spiral summit temple thunder tower trumpet
    tunnel valley violin volcano wagon
""")

# what the filler is made of
PLACES = _words("""
    bakery barn castle chapel cottage factory harbour hotel inn kitchen library lighthouse market mill
    museum palace school square stable station theatre village warehouse workshop
""")
QUALITIES = _words("big clean cold dark famous large little new plain quiet small strange tall warm white")
THINGS = _words("""
    barrel bench blanket bottle box carpet chair chest clock coat cradle curtain cushion drum fence fountain
    kettle lamp lantern map painting piano pillow plate rope statue stove table vase wheel
""")
VERBS = _words("""
    borrows carries displays has hides holds keeps lends needs offers owns sells shows stores uses wants
""")
PREPOSITIONS = _words("above behind below beside beyond near opposite under")
TIMES = _words("autumn evening morning night season spring summer week winter year")

WORDS = (*ATTRIBUTES, *ADJECTIVES, *NOUNS, *MATERIALS, *OBJECTS)
WORDS += (*PLACES, *QUALITIES, *THINGS, *VERBS, *PREPOSITIONS, *TIMES)

MIN_FACTS, MAX_FACTS = 3, 8
TEST_SHARE = 5  # one key in this many belongs to the test split


@dataclass(frozen=True)
class Fact:
    """One statement with the question that asks for it.

    `value` is the few words that answer the question, `answer` the full sentence.
    """

    key: str
    value: str
    statement: str
    question: str
    answer: str


def length(text: str) -> int:
    """The number of tokens of `text`: words, punctuation marks and paragraph breaks."""
    return len(re.findall(r"[A-Za-z]+|[^A-Za-z\s]|\n\n", text))


def vocabulary() -> list[str]:
    """Texts that between them hold every token of this world, sentence starts included."""
    spoken = [*conversations("long", "train", 200, seed=0), *conversations("short", "train", 200, seed=0)]
    texts = [message["content"] for talk in spoken for message in talk["messages"]]
    sentences = [*texts, *islice(filler(random.Random(0)), 2000)]
    starts = {sentence.split()[0] for sentence in sentences}
    return [*sentences, *(f" {word}" for word in (*WORDS, *starts))]


def split_of(owner: str) -> Split:
    """The split that an owner ("amber falcon") belongs to, the same on every machine."""
    return "test" if zlib.crc32(owner.encode()) % TEST_SHARE == 0 else "train"


def facts(split: Split, n: int, rng: random.Random) -> list[Fact]:
    """`n` facts with distinct owners and distinct values.

    An owner belongs to one split only, so no key of the test split occurs in the train split,
    whatever the seeds; the single words and the values are shared.
    """
    owners, values = set[str](), set[str]()
    found: list[Fact] = []
    while len(found) < n:
        owner = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        value = f"{rng.choice(MATERIALS)} {rng.choice(OBJECTS)}"
        if split_of(owner) != split or owner in owners or value in values:
            continue
        owners.add(owner)
        values.add(value)
        key = f"{rng.choice(ATTRIBUTES)} of the {owner}"
        statement = f"The {key} is {value}."
        found.append(Fact(key, value, statement, f"What is the {key}?", statement))
    return found


def filler(rng: random.Random) -> Iterator[str]:
    """An endless stream of English sentences that state no fact."""

    def place() -> str:
        return f"the {rng.choice(QUALITIES)} {rng.choice(PLACES)}"

    def thing() -> str:
        return f"a {rng.choice(QUALITIES)} {rng.choice(THINGS)}"

    while True:
        where = f"{rng.choice(PREPOSITIONS)} the {rng.choice(PLACES)}"
        clause = f"{place()} {rng.choice(VERBS)} {thing()} {where}"
        yield rng.choice(
            [
                *[f"T{clause[1:]}."] * 3,
                f"Every {rng.choice(TIMES)} {clause}.",
                f"Visitors say that {clause}.",
                f"There is {thing()} {rng.choice(PREPOSITIONS)} {place()}.",
            ]
        )


def document(
    statements: Sequence[str],
    n_tokens: int,
    rng: random.Random,
    depths: Sequence[float] | None = None,
) -> str:
    """A document of at most `n_tokens` tokens (and at most one sentence fewer) that hides `statements`.

    The statements stand among filler in paragraphs of varied size, each at its depth: 0 is the start
    of the document, 1 its end. Depths are drawn uniformly unless given. Raises ValueError if the
    statements alone are too long.
    """
    depths = [rng.random() for _ in statements] if depths is None else depths
    room = n_tokens - sum(map(length, statements))
    if room < 0:
        raise ValueError(f"{len(statements)} statements do not fit in {n_tokens} tokens")
    sentences: list[str] = []
    breaks: list[str] = []
    for sentence in filler(rng):
        starts_paragraph = bool(sentences) and rng.random() < 0.15
        room -= length(sentence) + starts_paragraph
        if room < 0:
            break
        sentences.append(sentence)
        breaks.append("\n\n" if starts_paragraph else " ")
    # a statement goes between two sentences; ties keep the order given
    placed = sorted(zip(depths, statements, strict=True), key=lambda pair: pair[0], reverse=True)
    for depth, statement in placed:
        at = round(depth * len(sentences))
        sentences.insert(at, statement)
        breaks.insert(at, " ")
    return "".join(gap + sentence for gap, sentence in zip(["", *breaks[1:]], sentences, strict=True))


def conversations(
    kind: Literal["long", "short"],
    split: Split,
    n: int,
    seed: int,
    min_tokens: int = 256,
    max_tokens: int = 2048,
) -> Iterator[dict]:
    """`n` conversations, each `{"messages": [{"role": ..., "content": ...}, ...]}`.

    A long one opens with a document of `min_tokens` to `max_tokens` tokens (log-uniform) and the
    first of up to 8 questions on it; later turns hold a question each. Most ask for a fact, some to
    continue a sentence. A short one has no document: greetings, repeating, small list tasks.
    """
    rng = random.Random(f"{kind} {split} {seed}")
    for _ in range(n):
        if kind == "long":
            text, pairs = _long_task(split, rng, min_tokens, max_tokens)
            pairs = [(f"{text}\n\n{pairs[0][0]}", pairs[0][1]), *pairs[1:]]
        else:
            pairs = [_short_task(rng) for _ in range(rng.randint(1, 3))]
        messages = []
        for question, answer in pairs:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        yield {"messages": messages}


def _long_task(split: Split, rng: random.Random, min_tokens: int, max_tokens: int) -> tuple[str, list[tuple[str, str]]]:
    hidden = facts(split, rng.randint(MIN_FACTS, MAX_FACTS), rng)
    # one sentence of slack keeps the document, which may be a little shorter than asked, in range
    size = _log_uniform(min(min_tokens + 20, max_tokens), max_tokens, rng)
    text = document([fact.statement for fact in hidden], size, rng)
    pairs = [(fact.question, fact.answer) for fact in hidden]
    if rng.random() < 0.25:
        pairs[-1] = _continuation(text, rng)
    rng.shuffle(pairs)
    return text, pairs


def _continuation(text: str, rng: random.Random) -> tuple[str, str]:
    """Asks how a sentence goes on, by its first words, which no other sentence shares."""
    sentences = re.findall(r"[A-Z][^.]*\.", text)
    while True:
        sentence = rng.choice(sentences)
        start = " ".join(sentence.split()[:6])
        if text.count(start) == 1:
            return f"How does this sentence go on: {start}", sentence


def _short_task(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(2, 5))
    listed = " ".join(words)
    return rng.choice(
        [
            ("Hello.", "Hello, how can I help?"),
            ("Good morning.", "Good morning, how can I help?"),
            ("Who are you?", "I am a tiny model that reads long documents."),
            ("Thank you.", "You are welcome."),
            (f"Repeat these words: {listed}.", f"You said: {listed}."),
            (f"What is the first word of this list: {listed}?", f"The first word is {words[0]}."),
            (f"What is the last word of this list: {listed}?", f"The last word is {words[-1]}."),
        ]
    )


def base_texts(n_tokens: int, seed: int, max_tokens: int = 2048) -> Iterator[dict]:
    """Texts, each `{"text": ...}`, of `n_tokens` tokens together, that teach a model to read: what stood before
    comes again. Their order is a curriculum, to be trained on without shuffling.

    First short lists of distinct words over and over (find the word after an earlier occurrence), then lists in
    which words recur (tell occurrences apart by more than one word), then phrases in changing order and documents
    whose facts, of the train split, stand there three times. Lengths grow up to `max_tokens`.
    """
    rng = random.Random(f"base {seed}")
    done = 0
    while done < n_tokens:
        text = _base_text(done / n_tokens, max_tokens, rng)
        done += length(text)
        yield {"text": text}


def _base_text(progress: float, max_tokens: int, rng: random.Random) -> str:
    """One text of the curriculum at `progress` from 0 to 1."""
    longest = 64 + (max_tokens - 64) * min(1, max(0, 2 * (progress - 0.1)))
    size, kind = _log_uniform(32, round(longest), rng), rng.random()
    if progress < 0.12:
        return _list(size, 16, distinct=True, rng=rng)
    if progress < 0.3:
        return _list(size, 64, distinct=kind < 0.4, rng=rng)
    if kind < 0.2:
        return _list(size, 256, distinct=False, rng=rng)
    return _phrases(size, rng) if kind < 0.45 else _restated(size, rng)


def _list(size: int, longest: int, distinct: bool, rng: random.Random) -> str:
    """A list of at most `longest` random words, over and over."""
    if distinct:
        words = rng.sample(WORDS, _log_uniform(4, max(5, min(longest, size // 3)), rng))
    else:
        period = _log_uniform(8, max(9, min(longest, size // 2)), rng)
        pool = rng.sample(WORDS, max(4, period // rng.choice([1, 1, 2, 4])))
        words = rng.choices(pool, k=period) if len(pool) < period else pool
    return "You said: " + " ".join((words * (size // len(words) + 1))[: size - 3])


def _restated(size: int, rng: random.Random) -> str:
    share = rng.uniform(0.2, 0.9)
    # a statement is about nine tokens
    statements = [fact.statement for fact in facts("train", max(1, int(size * share / 30)), rng)]
    return document([*statements, *statements, *statements], size, rng)


def _phrases(size: int, rng: random.Random) -> str:
    """Phrases of random words in random order, each about three times.

    The words recur across phrases when the pool is small, so that the word to come depends on more
    than the one before it.
    """
    pool = rng.sample(WORDS, min(len(WORDS), _log_uniform(16, 4 * len(WORDS), rng)))
    mean = _log_uniform(4, 32, rng)
    phrases, total = [], 0
    while total < size / 3:
        phrase = rng.choices(pool, k=rng.randint(mean // 2 + 1, mean + mean // 2))
        phrases.append(" ".join(phrase))
        total += len(phrase)
    words = " ".join(phrase for _ in range(3) for phrase in rng.sample(phrases, len(phrases))).split()
    return "You said: " + " ".join(words[: size - 3])


def _log_uniform(low: int, high: int, rng: random.Random) -> int:
    return round(low * (high / low) ** rng.random())
