"""Strategies side by side, for `stats`, `plan` and `bench`: the command's strategy.key=value hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from longalign.config import compose_config, groups
from longalign.errors import UserError
from longalign.progress import Bar
from longalign.schema import Config, Strategy

T = TypeVar("T")


def names() -> list[str]:
    """Of all strategies of conf/."""
    return groups()["strategy"]


def given(strategy: Strategy) -> list[str]:
    """What the command changed of its strategy, as words for another: ["strategy.packs_per_step=16"]."""
    defaults = compose_config("group", [f"strategy={strategy.name}"]).strategy.model_dump()
    changed = {key: value for key, value in strategy.model_dump().items() if value != defaults[key]}
    return [f"strategy.{key}={'null' if value is None else value}" for key, value in changed.items()]


def strategy_of(item: str, words: list[str]) -> Strategy:
    """The strategy that `NAME key=value ...` means. words: of `given`, where it says nothing. Raises UserError."""
    name, *settings = item.split() or [""]
    return compose_config("group", [f"strategy={name}", *words, *(f"strategy.{s}" for s in settings)]).strategy


def of_each(config: Config, title: str, make: Callable[[Config], T]) -> tuple[dict[str, T], dict[str, str]]:
    """{name: make(config with that strategy)}, and {name: why} of strategies that do not go with a setting.

    Raises UserError if none does.
    """
    words, made, refused = given(config.strategy), dict[str, T](), dict[str, str]()
    with Bar(title, len(names()), "strategies") as bar:
        for name in names():
            try:
                made[name] = make(config.model_copy(update={"strategy": strategy_of(name, words)}))
            except UserError as error:  # such as sorted with shuffle=false
                refused[name] = str(error)
            bar.advance(1, note=name)
    if not made:
        raise UserError(refused[config.strategy.name])
    return made, refused
