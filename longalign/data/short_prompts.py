"""Prompts of short tasks, built by program: a subject, put into one of several wordings of its kind.

    "explain", "photosynthesis"  ->  "Explain photosynthesis in two sentences."

A subject belongs to the odd seeds or to the even ones, by its hash: prompts of seed 1 (to train on) and of seed 2 (to
test with) share no subject, whatever the wording. The small words that sentences are made of stand on both sides.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

TRIES = 2000  # draws that find no new prompt before a kind counts as used up


def _parts(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(";"))


# -- what subjects are made of -------------------------------------------------------------------------------

NAMES = tuple("Anna Ben Clara David Emma Farid Grace Hugo Ines Jonas Kofi Lena Marco Nadia Omar Paula Ravi Sofia".split())
PEOPLE = _parts("""my neighbour; our teacher; the new manager; the old gardener; her younger brother; a group of students;
    the bus driver; his grandmother; the team; a young doctor; the shop owner; our guide; the committee; a visitor""")
DEEDS = _parts("""repaired the broken window; forgot the umbrella; planted three apple trees; wrote a long letter;
    missed the last train; painted the kitchen blue; found a lost dog; cancelled the meeting; baked bread for everyone;
    sold the old car; learned to play the guitar; moved the heavy boxes; changed the schedule; took hundreds of photos;
    solved the problem quickly; told a funny story; ordered too much food; cleaned the whole house; lost the keys;
    won a small prize; borrowed a tent; fixed the printer; closed the account; finished the report""")
PLACES = _parts("""in the garden; at the station; near the river; in the office; at the market; behind the school;
    in a small village; at the library; in the city centre; by the sea; in the mountains; at home""")
TIMES = _parts("""yesterday; last week; on Monday morning; before breakfast; in the spring; after the storm; two years ago;
    on a rainy day; late in the evening; during the holidays""")

TOPICS = _parts("""photosynthesis; gravity; inflation; the water cycle; electricity; a solar eclipse; recycling; democracy;
    evolution; a vaccine; magnetism; the internet; a black hole; supply and demand; the food chain; a budget; friction;
    global warming; an algorithm; the seasons; a volcano; biodiversity; compound interest; a metaphor; meditation;
    an ecosystem; the immune system; a database; machine learning; sound waves; tides; an earthquake; erosion; density;
    the heart; fermentation; a blockchain; copyright; a rainbow; sleep; probability; an atom; a molecule; DNA; cells;
    energy; pressure; temperature; the solar system; the moon; stars; a hypothesis; a computer virus; encryption; taxes;
    insurance; a loan; a mortgage; a stock; marketing; teamwork; empathy; stress; a habit; creativity; critical thinking;
    plastic pollution; renewable energy; wind power; nuclear energy; deforestation; migration of birds; pollination;
    camouflage; hibernation; digestion; oxygen; carbon dioxide; rust; evaporation; condensation; a lever; a pulley;
    an engine; a battery; a transistor; a compiler; an operating system; open source software; a web browser; a password;
    the alphabet; a sonnet; a novel; jazz; classical music; photography; perspective in painting; architecture""")
THINGS = _parts("""fruits; vegetables; kitchen tools; musical instruments; European capitals; planets; ways to save water;
    ways to save money; healthy breakfasts; outdoor activities; indoor games; farm animals; wild animals; sea animals;
    birds; insects; trees; flowers; spices; desserts; soups; colours; sports; winter sports; team sports; hobbies; jobs;
    school subjects; programming languages; ways to learn a language; tips for better sleep; tips for a job interview;
    ideas for a birthday party; gifts for a friend; things to pack for a trip; reasons to exercise; benefits of reading;
    famous scientists; inventions; means of transport; parts of a car; parts of a house; pieces of furniture; clothes;
    materials used in building; metals; gases; rivers; oceans; deserts; mountains; islands; languages; holidays;
    board games; kinds of weather; sources of energy; renewable resources; safety rules for the kitchen; good manners;
    ways to reduce stress; ways to stay focused; questions to ask a new colleague; rules for a library; kinds of bread;
    kinds of cheese; drinks; office supplies; garden tools; uses of paper; uses of a smartphone; file formats""")
PAIRS = _parts("""a lake and a river; a frog and a toad; weather and climate; a city and a village; tea and coffee; RAM and a
    hard disk; a simile and a metaphor; a novel and a short story; a virus and a bacterium; speed and velocity; mass and
    weight; a planet and a star; a comet and an asteroid; butter and margarine; a debit card and a credit card; a lizard and
    a snake; an alligator and a crocodile; a moth and a butterfly; a fruit and a vegetable; renting and buying a house; a list
    and a tuple in Python; a compiler and an interpreter; HTTP and HTTPS; a laptop and a tablet; a bicycle and a motorcycle;
    a bus and a tram; opinion and fact; income and wealth; saving and investing; a hurricane and a tornado; jam and honey;
    a violin and a guitar; an orchestra and a band; a poem and a song; stalactites and stalagmites; rice and pasta""")
GOALS = _parts("""learn to cook; wake up earlier; remember names; save money each month; prepare for an exam; write a good email;
    grow tomatoes; keep a room tidy; drink more water; read more books; make new friends; speak in public; find a job;
    learn a new language; plan a trip; reduce waste at home; care for a cat; train a puppy; keep houseplants alive;
    run five kilometres; sleep better; choose a bicycle; organise a small party; take better photos; manage time well;
    stop losing keys; clean a keyboard; back up a computer; make a strong password; study in a group; write a diary""")
FUNCTIONS = _parts("""reverses a string; adds two numbers; returns the largest of three numbers; checks whether a number is even;
    counts the vowels in a string; computes the factorial of a number; checks whether a word is a palindrome; sorts a list of
    numbers; sums the numbers of a list; removes duplicates from a list; converts Celsius to Fahrenheit; counts the words of a
    text; finds the shortest word of a list; returns the first n Fibonacci numbers; checks whether a number is prime; computes
    the average of a list; joins a list of words with commas; counts how often each letter occurs; swaps two variables; finds the
    common elements of two lists; squares every number of a list; reads a file line by line; turns a string into upper case;
    computes the area of a circle; finds the greatest common divisor of two numbers; prints the multiplication table of a number;
    picks a random element of a list; rounds a number to two digits; checks whether a year is a leap year; flattens a nested list""")
COUNTRIES = _parts("""France; Italy; Spain; Germany; Japan; China; India; Brazil; Argentina; Canada; Mexico; Egypt; Kenya; Norway;
    Sweden; Finland; Denmark; Poland; Greece; Turkey; Portugal; Austria; Switzerland; Belgium; Ireland; Russia; Australia; Peru;
    Chile; Cuba; Thailand; Vietnam; Indonesia; South Korea; Morocco; Nigeria; Ethiopia; Iceland; Hungary; the Netherlands""")
GOODS = _parts("""phone; book; restaurant; hotel; film; headset; coffee machine; jacket; backpack; bicycle; game; course; lamp;
    mattress; concert; museum""")
PRAISE = _parts("""was better than I expected; works perfectly; made me very happy; is worth every cent; left me smiling""")
BLAME = _parts("""was a waste of money; stopped working after two days; made me angry; is far too expensive; left me disappointed""")
ITEMS = tuple("apples pencils tickets books eggs chairs cookies stamps marbles bottles".split())
OCCASIONS = _parts("""to say thank you for a gift; to move a meeting to Friday; to ask for a day off; to invite someone to dinner;
    to apologise for being late; to ask about a late delivery; to congratulate on a new job; to ask for help with a project;
    to cancel a reservation; to say goodbye on the last day at work; to ask for feedback; to recommend a restaurant""")
RECIPIENTS = _parts("a colleague; a friend; a manager; a teacher; a customer; a neighbour; a landlord; a cousin")
HEROES = _parts("""a brave mouse; a lonely robot; an old sailor; a curious cat; a tiny dragon; a lost astronaut; a shy painter;
    a talking tree; a young baker; a forgetful wizard; two sisters; a clever fox""")
QUESTS = _parts("""who finds a map; who learns to share; who cannot sleep; who wants to see the sea; who makes a new friend;
    who gets lost in a forest; who saves a village; who loses a shoe; who builds a bridge; who discovers a secret door""")
WORDS = sorted({word for words in (*DEEDS, *GOALS) for word in words.split() if len(word) > 4})


# -- subjects ------------------------------------------------------------------------------------------------

Rng = random.Random


def _sentence(rng: Rng) -> str:
    sentence = f"{rng.choice(PEOPLE)} {rng.choice(DEEDS)} {rng.choice(PLACES)} {rng.choice(TIMES)}."
    return sentence[0].upper() + sentence[1:]


def _passage(rng: Rng) -> str:
    name, first, second = rng.choice(NAMES), *rng.sample(DEEDS, 2)
    what, third = rng.choice(GOALS), rng.choice(PEOPLE)
    return (
        f"{name} had always wanted to {what}. {rng.choice(TIMES).capitalize()}, {name} {first} {rng.choice(PLACES)}, and "
        f"{third} {second}. It took much longer than planned, but in the end both of them were glad that they had tried."
    )


def _exercise(rng: Rng) -> str:
    name, item, price = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(2, 12)
    a, b = rng.randint(6, 60), rng.randint(2, 40)
    low, high = sorted((a, b))
    return rng.choice(
        [
            f"What is {a} + {b}?",
            f"What is {high} - {low}?",
            f"What is {price} x {b}?",
            f"{name} has {high} {item} and gives {low} of them away. How many {item} are left?",
            f"{name} has {a} {item} and buys {b} more. How many {item} are there now?",
            f"A box holds {price} {item}. How many {item} are in {b} boxes?",
        ]
    )


def _review(rng: Rng) -> str:
    return f'"The {rng.choice(GOODS)} {rng.choice([*PRAISE, *BLAME])}. {_sentence(rng)}"'


def _message(rng: Rng) -> str:
    day = f"{rng.randint(1, 28)} {rng.choice('January March April June July September October'.split())}"
    where, hour = rng.choice(PLACES), f"{rng.randint(8, 20)}:{rng.choice(['00', '15', '30', '45'])}"
    return f'"Hello {rng.choice(NAMES)}, let us meet {where} on {day} at {hour}. Bring {rng.choice(ITEMS)}! {rng.choice(NAMES)}"'


def _words(rng: Rng) -> str:
    return ", ".join(rng.sample(WORDS, rng.randint(4, 6)))


class Kind(NamedTuple):
    subject: Callable[[Rng], str]
    wordings: tuple[str, ...]


def _one_of(subjects: tuple[str, ...]) -> Callable[[Rng], str]:
    return lambda rng: rng.choice(subjects)


KINDS: dict[str, Kind] = {
    "rewrite": Kind(
        _sentence,
        _parts("""Rewrite this sentence in a more formal way: {}; Make this sentence shorter: {}; Rewrite this sentence in the
            future tense: {}; Turn this sentence into a question: {}; Say this in other words: {}; Rewrite this sentence so
            that a child understands it: {}; Rewrite this sentence in the passive voice: {}"""),
    ),
    "summarise": Kind(
        _passage,
        _parts("""Summarize this text in one sentence: {}; What is the main point of this text? {}; Give this text a title: {};
            {} What happened? Answer in one short sentence.; Sum this up in at most ten words: {}"""),
    ),
    "list": Kind(
        _one_of(THINGS),
        _parts("""List three {}.; Name five {}.; Give me four examples of {}.; Make a short list of {}.; Name two {} and say one
            sentence about each.; List three {}, separated by commas.; I need a numbered list of five {}."""),
    ),
    "explain": Kind(
        _one_of(TOPICS),
        _parts("""Explain {} in one sentence.; Explain {} to a ten-year-old.; Explain {} briefly.; Tell me about {} in two
            sentences.; Give a short definition of {}.; Why does {} matter? Answer in one or two sentences.; Give one example
            that has to do with {}, in a sentence."""),
    ),
    "arithmetic": Kind(_exercise, _parts("{}; {} Show your work.; {} Answer with the number alone.; Solve this: {}")),
    "translate": Kind(
        _sentence,
        _parts("""Translate this sentence to French: {}; Translate this sentence to Spanish: {}; Translate to German: {};
            How do you say this in Italian? {}; Translate to Portuguese: {}"""),
    ),
    "classify": Kind(
        _review,
        _parts("""Is this review positive or negative? {}; Classify the sentiment of this review as positive or negative, in one
            word: {}; {} Did the customer like it? Answer yes or no.; {} Which feeling does this express?"""),
    ),
    "code": Kind(
        _one_of(FUNCTIONS),
        _parts("""Write a Python function that {}.; Write a short JavaScript function that {}.; Show me a one-line Python function
            that {}.; Write a Python function that {}, with a docstring.; Give me a code snippet that {}."""),
    ),
    "compare": Kind(
        _one_of(PAIRS),
        _parts("""What is the difference between {}?; Compare {} in two sentences.; What do {} have in common? Answer
            briefly.; Name one difference between {}."""),
    ),
    "extract": Kind(
        _message,
        _parts("""When is the meeting? {}; Extract the date, the time and the place: {}; Who wrote this message, and to whom? {};
            {} Write the date and the time on two lines."""),
    ),
    "write": Kind(
        lambda rng: f"{rng.choice(RECIPIENTS)} {rng.choice(OCCASIONS)}",
        _parts("""Write a short email to {}.; Write a message of one sentence to {}.; Write a friendly note to {}, in two
            sentences.; Draft a brief text message to {}."""),
    ),
    "story": Kind(
        lambda rng: f"{rng.choice(HEROES)} {rng.choice(QUESTS)}",
        _parts("""Write a story of three sentences about {}.; Write a two-line poem about {}.; Give me a title for a story about
            {}.; Write the first sentence of a story about {}."""),
    ),
    "sort": Kind(
        _words,
        _parts("""Sort these words alphabetically: {}; Write these words in reverse order: {}; Which of these words is the
            longest? {}; How many words are in this list? {}; Write these words in capital letters: {}"""),
    ),
    "advice": Kind(
        _one_of(GOALS),
        _parts("""How can I {}? Give one tip.; I want to {}. What should I do first?; Give me three short tips to {}.; Is it hard
            to {}? Answer in one sentence.; Why should I {}? Answer briefly."""),
    ),
    "facts": Kind(
        _one_of(COUNTRIES),
        _parts("""What is the capital of {}?; On which continent is {}?; Which language is spoken in {}?; Name a famous dish from
            {}.; Tell me one fact about {}.; Name a city in {} that is not the capital."""),
    ),
}


def prompts(kinds: list[str], seed: int) -> Iterator[tuple[str, str]]:
    """(kind, prompt), none twice. Kinds take turns; one whose prompts are used up leaves the others their turns."""
    rng, seen, left = random.Random(f"short prompts {seed}"), set[str](), list(kinds)
    while left:
        for kind in list(left):
            prompt = next((p for p in _draws(kind, seed, rng) if p not in seen), None)
            if prompt is None:
                left.remove(kind)
                continue
            seen.add(prompt)
            yield kind, prompt


def side_of(subject: str) -> int:
    """0: of the even seeds; 1: of the odd ones. The same on every machine."""
    return zlib.crc32(subject.encode()) % 2


def _draws(kind: str, seed: int, rng: Rng) -> Iterator[str]:
    """TRIES prompts of the seed's own subjects, or fewer."""
    subject_of, wordings = KINDS[kind]
    for _ in range(TRIES):
        subject, wording = subject_of(rng), rng.choice(wordings)
        if side_of(subject) == seed % 2:
            yield wording.format(subject)
