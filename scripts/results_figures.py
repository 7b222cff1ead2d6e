"""Figures of one run of docs/results/*.json; None where they are not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
Value = Callable[[Record], float | None]
WARM_UP = 4  # steps


def at(*keys: str) -> Value:
    def value(found: Any) -> float | None:
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                return None
            found = found[key]
        return found

    return value


def longest(task: str) -> Value:
    def value(record: Record) -> float | None:
        lengths = at("eval", "tasks", task, "by_length")(record)
        return lengths[max(lengths, key=int)]["score"] if lengths else None

    return value


def minutes(record: Record) -> float | None:
    seconds = at("train", "metrics", "step_s")(record)
    return sum(seconds) / 60 if seconds else None


def speed(record: Record) -> float | None:
    """Tokens a second without the first steps, in which kernels compile and `activations=budget` chooses."""
    metrics = at("train", "metrics")(record)
    if not metrics:
        return None
    tokens, seconds = (metrics[name][WARM_UP:] or metrics[name] for name in ("tokens", "step_s"))
    return sum(tokens) / sum(seconds)


def steps(record: Record) -> float | None:
    metrics = at("train", "metrics")(record)
    return len(metrics["step"]) if metrics else None


def against(untouched: Record | None) -> Value:
    """The short loss against that of the untouched model, as a share."""
    short = at("eval", "tasks", "heldout", "by_source", "short", "loss")
    before = short(untouched)

    def value(record: Record) -> float | None:
        after = short(record)
        return after / before - 1 if after and before else None

    return value


def columns(records: dict[str, Record]) -> dict[str, tuple[Value, str]]:
    tasks = ("eval", "tasks")
    return {
        "needle": (at(*tasks, "needle", "score"), ".2f"),
        "needle, longest": (longest("needle"), ".2f"),
        "retrieval": (at(*tasks, "retrieval", "score"), ".2f"),
        "retrieval, longest": (longest("retrieval"), ".2f"),
        "long loss": (at(*tasks, "heldout", "by_source", "long", "loss"), ".3f"),
        "short loss": (at(*tasks, "heldout", "by_source", "short", "loss"), ".4f"),
        "short loss against untouched": (against(records.get("untouched")), "+.1%"),
        "steps": (steps, ",.0f"),
        "long samples' weight": (at("train", "loss_weight_of_long"), ".0%"),
        "minutes": (minutes, ".1f"),
        "tokens/s": (speed, ",.0f"),
        "peak GB": (at("train", "peak_mem_gb"), ".1f"),
    }
