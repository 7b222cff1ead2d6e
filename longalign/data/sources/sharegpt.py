"""What conversations copied from chat pages need: text from HTML, a choice of languages, cutting where too long."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from typing import Any

from longalign.data.messages import BadSample, Messages
from longalign.data.sources.html import is_html, to_markdown, without_buttons
from longalign.errors import UserError
from longalign.model.load import load_template
from longalign.schema import Config, ShareGPT

# A conversation is taken for another language's only if the detector is that sure; it is not on short texts.
SURE = 0.9
LOOKED_AT = 5000  # characters of a conversation
NO_LANGUAGE = "zxx"  # the detector's word for numbers, code and the like
CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


class Pages:
    """What source=sharegpt does to a conversation. Raises UserError for settings that cannot hold."""

    def __init__(self, config: Config, source: ShareGPT):
        self.html, self.limit = source.html, source.max_tokens
        self.languages = Languages(source.languages) if source.languages else None
        self.template = load_template(config) if self.limit else None
        if self.template and self.template.name == "text":
            raise UserError(
                "source.max_tokens counts a conversation's tokens and template=text takes none; change either"
            )

    def clean(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
        """The messages with HTML made text, and how many were. Raises BadSample."""
        cleaned, changes = [], Counter[str]()
        for message in messages:
            role, text = message["role"], message["content"]
            if isinstance(text, str):
                if self.html == "all" or (self.html == "auto" and is_html(text, role)):
                    changes["turns made text from HTML"] += 1
                    text = to_markdown(text)
                text = without_buttons(text) if role == "assistant" else text
            cleaned.append({"role": role, "content": text})
        return cleaned, changes

    def parts(self, messages: Messages) -> list[Messages]:
        """The conversation, cut where source.max_tokens asks for it. Raises BadSample for an unwanted language."""
        if self.languages:
            self.languages.check(messages)
        return split(messages, self.limit, self._length) if self.limit else [messages]

    def _length(self, messages: Messages) -> int:
        """Tokens of the conversation as it will be trained on, in the longest row if the template makes several."""
        assert self.template is not None
        return max(len(row.ids) for row in self.template.rows(messages))


class Languages:
    """Tells whether a conversation is in one of the wanted languages (ISO 639 codes). Raises UserError."""

    def __init__(self, wanted: list[str]):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self.detector = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        if unknown := sorted(set(wanted) - set(self.detector.nb_classes)):
            known = ", ".join(sorted(set(self.detector.nb_classes) - {NO_LANGUAGE}))
            raise UserError(f"source.languages: unknown language {unknown[0]!r}; one of {known}")
        self.wanted = {*wanted, NO_LANGUAGE}
        if "zh" in self.wanted:  # the detector takes many a text in traditional characters for Cantonese
            self.wanted |= {"yue", "wuu"}

    def check(self, messages: Messages) -> None:
        """Raise BadSample if the conversation, code apart, is surely in another language."""
        text = CODE.sub("", "\n".join(message["content"] for message in messages))
        language, probability = self.detector.classify(text[:LOOKED_AT])
        if language not in self.wanted and probability >= SURE:
            raise BadSample(f"language {language}")


def split(messages: Messages, limit: int, length: Callable[[Messages], int]) -> list[Messages]:
    """Cut a conversation before questions into as few parts of at most `limit` tokens as go in order.

    Each part begins with the system message, if there is one. A question with an answer that is longer than the limit
    by itself is a part of its own: what to do with it is for `truncate` to say.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    rounds = [messages[i : i + 2] for i in range(len(system), len(messages), 2)]

    def taken(count: int) -> Messages:
        return [*system, *(message for pair in rounds[:count] for message in pair)]

    parts = []
    while rounds:
        fits = len(rounds)
        if length(taken(fits)) > limit:  # most conversations fit as they are
            fits = max(1, bisect_right(range(1, fits), limit, key=lambda count: length(taken(count))))
        parts.append(taken(fits))
        rounds = rounds[fits:]
    return parts
