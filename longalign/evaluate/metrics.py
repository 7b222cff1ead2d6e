"""LongBench's own metrics: F1 over words and ROUGE-L, both 0 to 1 (LongBench, metrics.py; the `rouge` package 1.0.1).

English is split at spaces, without case, punctuation and articles for F1; Chinese by jieba.
"""

from __future__ import annotations

import functools
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from longalign.errors import UserError

PUNCTUATION = set(string.punctuation) | set(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)


def words(text: str, language: str) -> list[str]:
    """As F1 counts them."""
    if language == "zh":
        cut = (_plain(word) for word in _jieba()(text))
        return [word for word in ("".join(part.split()) for part in cut) if word]
    return [word for word in _plain(text).split() if word not in ("a", "an", "the")]


def f1(answer: str, reference: str, language: str) -> float:
    """Harmonic mean of precision and recall over words, repeated ones counted as often as both have them."""
    said, wanted = words(answer, language), words(reference, language)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def rouge_l(answer: str, reference: str, language: str) -> float:
    """F1 of the longest common subsequences of every sentence pair, over distinct words (summary-level ROUGE-L)."""
    if language == "zh":
        answer, reference = (" ".join(_jieba()(text)) for text in (answer, reference))
    said, wanted = _sentences(answer), _sentences(reference)
    n_said, n_wanted = (len({word for sentence in text for word in sentence}) for text in (said, wanted))
    common = len({word for one in wanted for other in said for word in _common(one, other)})
    return 2 * common / (n_said + n_wanted) if common else 0.0


def _sentences(text: str) -> list[list[str]]:
    """Words between full stops, as they stand."""
    return [found for part in text.split(".") if (found := part.split())]


def _common(one: Sequence[str], other: Sequence[str]) -> set[str]:
    """The words of a longest common subsequence; of several, the one that rouge's way back through the table finds."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one, 1):
        above, row = table[i - 1], table[i]
        for j, match in enumerate(other, 1):
            row[j] = above[j - 1] + 1 if word == match else max(above[j], row[j - 1])
    found, i, j = set(), len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.add(one[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _plain(text: str) -> str:
    return "".join(char for char in text.lower() if char not in PUNCTUATION)


@functools.cache
def _jieba() -> Callable[[str], list[str]]:
    """Raises UserError if it is not installed."""
    try:
        import jieba
    except ImportError:
        told = "LongBench's Chinese datasets need jieba: pip install 'longalign[longbench]', or leave them out"
        raise UserError(told) from None
    jieba.setLogLevel("ERROR")
    cut: Any = jieba.lcut
    return cut
