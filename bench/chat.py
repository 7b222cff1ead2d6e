"""What keeping keys and values between turns saves: the second question about a document, with and without it.

    python bench/chat.py [tokens] [model.path=... key=value ...]

Asks two questions about a document of about that many tokens (3,000 by default; model=tiny on a CPU unless said
otherwise), each answered with one token, so that the time is the reading. `kept` reads what the first question left;
`fresh` forgets it first. Median of five runs; the answers must be equal.
"""

from __future__ import annotations

import statistics
import sys
import time

from longalign.chat.local import LocalModel
from longalign.config import compose_config


def main(words: list[str]) -> None:
    tokens = int(words.pop(0)) if words and words[0].isdigit() else 3000
    model = LocalModel(compose_config("chat", ["model=tiny", "cluster=cpu", "max_new_tokens=1", *words]))
    sentence = "The quiet lantern near the mill keeps the amber falcon. "
    one = model.count([{"role": "user", "content": sentence * 10}]) / 10
    first = [{"role": "user", "content": sentence * round(tokens / one) + "\n\nWhat keeps the falcon?"}]
    second = [*first, {"role": "assistant", "content": "amber"}, {"role": "user", "content": "Where is the lantern?"}]
    seconds: dict[str, list[float]] = {"first": [], "kept": [], "fresh": []}
    said: dict[str, str] = {}
    for _ in range(5):
        for name, messages in (("first", first), ("kept", second), ("fresh", second)):
            if name != "kept":
                model.forget()
            pieces: list[str] = []
            start = time.perf_counter()
            told = model.answer(messages, pieces.append)
            seconds[name].append(time.perf_counter() - start)
            said[name] = "".join(pieces)
            print(f"{name:<6}{told.prompt:>8,} tokens, {told.kept:>8,} kept, {seconds[name][-1]:8.3f} s")
    assert said["kept"] == said["fresh"]
    kept, fresh = statistics.median(seconds["kept"]), statistics.median(seconds["fresh"])
    print(f"second question: {fresh:.3f} s fresh, {kept:.3f} s with the first one's cache, ratio {fresh / kept:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
