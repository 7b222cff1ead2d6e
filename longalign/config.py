"""From `key=value` words to a checked Config: quoting, composing with Hydra, validating, freezing.

Hydra lives in this file and in sweep.py; everything else receives a plain `Config`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from longalign.errors import UserError
from longalign.schema import Config

COMMANDS = (
    "prepare",
    "tokenize",
    "group",
    "train",
    "watch",
    "stats",
    "eval",
    "chat",
    "verify",
    "plan",
    "bench",
    "convert",
)
FREE_TEXT = {"prompt"}  # taken to the letter: neither Hydra quotes nor interpolations are read in them
PACKAGE = Path(__file__).parent


def conf_dir() -> Path:
    """The shipped configuration: inside an installed package, or beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def beside(path: str, name: str) -> str:
    """`RUN/model` of a run of ours -> `RUN/<name>`; any other model -> `runs/<name>/<its name>`."""
    run = Path(path).parent
    ours = (run / "config.yaml").is_file()
    return str(run / name) if ours else f"runs/{name}/{Path(path).name}"


OmegaConf.register_new_resolver("bundled", lambda name: str(PACKAGE / "assets" / name), replace=True)
OmegaConf.register_new_resolver("beside", beside, replace=True)
OmegaConf.register_new_resolver(
    "evaluated", lambda path, compare: "runs/compare" if compare else beside(path, "eval"), replace=True
)


# -- the schema, seen as dotted keys ----------------------------------------------------------------


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, an Annotated or an Optional, flattened."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [a for member in typing.get_args(annotation) for a in _alternatives(member)]
    return [annotation]


def schema_keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, list[Any]]:
    """Dotted key -> its possible types, for every key of the schema (sections included)."""
    hints = typing.get_type_hints(model, include_extras=True)
    keys: dict[str, list[Any]] = {}
    for name in model.model_fields:
        kinds = _alternatives(hints[name])
        keys[prefix + name] = kinds
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                for key, more in schema_keys(kind, f"{prefix}{name}.").items():
                    keys[key] = keys.get(key, []) + more  # the members of a union share some keys
    return keys


KEYS = schema_keys()


def allowed_values(key: str) -> list[str]:
    """The words a key may have, for completion; empty if it takes any."""
    values: list[str] = []
    for kind in KEYS.get(key, []):
        values += map(str, typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else []
        values += ["true", "false"] if kind is bool else []
        values += ["null"] if kind is types.NoneType else []
    return values


def _is_text(kinds: list[Any]) -> bool:
    return str in kinds or list[str] in kinds


def _is_free(key: str) -> bool:
    """A free-form section such as model.config or mix, or inside one."""
    parts = key.split(".")
    sections = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return any(typing.get_origin(kind) is dict for s in sections for kind in KEYS.get(s, []))


def groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Configuration groups and their options, the user's own folder included."""
    found: dict[str, set[str]] = {}
    for root in (conf_dir(), Path(config_dir)) if config_dir else (conf_dir(),):
        for file in root.glob("*/*.yaml"):
            if file.stem != "base":
                found.setdefault(file.parent.name, set()).add(file.stem)
    return {name: sorted(options) for name, options in sorted(found.items())}


def nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


# -- words of the command line ------------------------------------------------------------------------


def quote(word: str, multirun: bool = False) -> str:
    """Quote the value of a text key so that Hydra's grammar takes it as typed.

    `file=My Docs (1).txt` -> `file="My Docs (1).txt"`. Lists (`[a,b]`), null, interpolations, values that
    are quoted already and, in a multirun, sweep lists (`a,b`) keep their meaning, except in free text.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if not equals or name not in KEYS or not _is_text(KEYS[name]) or value in ("", "null"):
        return word
    if name in FREE_TEXT:
        if multirun and "," in value:
            return word
        literal = QuotedString(text=value.replace("${", "\\${"), quote=Quote.double)
        return f"{key}={literal.with_quotes()}"
    in_list = list[str] in KEYS[name] and value.startswith("[") and value.endswith("]") and "]," not in value
    if in_list:
        return f"{key}=[{','.join(_quoted(item.strip()) for item in value[1:-1].split(',') if item.strip())}]"
    is_sweep = multirun and ("," in value or value.endswith(")"))
    return word if is_sweep else f"{key}={_quoted(value)}"


def _quoted(value: str) -> str:
    """In double quotes, unless it is quoted already."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value
    return QuotedString(text=value, quote=Quote.double).with_quotes()


def parse(words: list[str], multirun: bool = False, config_dir: str | None = None) -> list[Override]:
    """Parse and check the words: every key is a group or a key of the schema, every option exists."""
    known_groups = groups(config_dir)
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"expected key=value, got {word!r}{nearest(word, [*KEYS, *known_groups])}")
    words = [f"++{w}" if _is_free(w.partition("=")[0]) else quote(w, multirun) for w in words]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise UserError(f"cannot read the overrides: {str(error).splitlines()[0]}") from None
    for override in overrides:
        _check(override, multirun, known_groups)
    return overrides


def _check(override: Override, multirun: bool, known_groups: dict[str, list[str]]) -> None:
    key = override.key_or_group
    if key.startswith(("hydra.", "hydra/")):
        if not multirun:
            raise UserError(f"{key} takes effect in a sweep only: add -m")
        return
    if key in known_groups:
        value = override.value()
        if isinstance(value, Glob):  # strategy=glob(*): Hydra picks among what exists
            return
        if override.is_sweep_override():
            values = list(getattr(value, "list", None) or override.sweep_string_iterator())
        else:
            values = value if isinstance(value, list) else [value]
        for option in values:
            option = getattr(option, "text", option)
            if option is not None and str(option) not in known_groups[key]:
                raise UserError(
                    f"{key}={option} does not exist{nearest(str(option), known_groups[key])} "
                    f"(one of {', '.join(known_groups[key])})"
                )
    elif key not in KEYS and not _is_free(key):
        raise UserError(f"unknown key {key!r}{nearest(key, [*KEYS, *known_groups])}")


# -- composing ------------------------------------------------------------------------------------------


def compose_config(command: str, words: list[str], config_dir: str | None = None) -> Config:
    """Compose conf/COMMAND.yaml with the given words and check the result.

    Raises UserError naming the key, the value and what is allowed.
    """
    overrides = override_words(parse(words, config_dir=config_dir), config_dir)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            composed = compose(command, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(unused_key(error, config_dir) or hydra_message(error)) from None
    return validate(composed)


def unused_key(error: Exception, config_dir: str | None) -> str | None:
    """What to say of a key that stands in another option of its group than the chosen one; None for other errors."""
    found = re.search(r"Could not override '((\w+)\.[\w.]+)'", str(error))
    options = groups(config_dir).get(found[2], []) if found else []
    if found is None or not options:
        return None
    return f"{found[1]} is no setting of the {found[2]} chosen: give {found[2]}= as well (one of {', '.join(options)})"


def override_words(overrides: list[Override], config_dir: str | None) -> list[str]:
    """The checked overrides as Hydra takes them, with the user's own folder on its search path."""
    words = [o.input_line or "" for o in overrides]
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(f"--config-dir {config_dir}: no such folder")
        folder = QuotedString(f"file://{Path(config_dir).resolve()}", Quote.double).with_quotes()
        words.append(f"hydra.searchpath=[{folder}]")
    return words


def hydra_message(error: Exception) -> str:
    causes = [str(e).strip() for e in (error, error.__cause__) if e is not None and str(e).strip()]
    return "configuration: " + ": ".join(c.splitlines()[0].rstrip(".") for c in dict.fromkeys(causes))


def validate(composed: DictConfig) -> Config:
    """Resolve interpolations and check every key against the schema."""
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        missing = getattr(error, "full_key", None)
        if "Missing mandatory value" in str(error):
            raise UserError(f"{missing} has no value: give it as {missing}=...") from None
        raise UserError(hydra_message(error)) from None
    assert isinstance(plain, dict)
    return from_dict({str(k): v if k in FREE_TEXT else _expand_home(v) for k, v in plain.items() if k != "hydra"})


def _expand_home(value: Any) -> Any:
    """`~/x` -> `/home/me/x`, in every text below `value`."""
    if isinstance(value, dict):
        return {k: _expand_home(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand_home(v) for v in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def from_dict(plain: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(plain)
    except ValidationError as error:
        raise UserError("\n".join(_pydantic_messages(error.errors()))) from None


def _pydantic_messages(errors: Iterable[Any]) -> list[str]:
    """One line per wrong key; the alternatives of a union are joined by "or"."""
    wrong: dict[str, list[str]] = {}
    for error in errors:
        # below "source" pydantic puts the name of the union's member, which is no part of the key
        parts = [part for n, part in enumerate(error["loc"]) if n != 1 or error["loc"][0] != "source"]
        given = key = ".".join(map(str, parts))
        while key not in KEYS and "." in key and not _is_free(key) and error["type"] != "extra_forbidden":
            key = key.rpartition(".")[0]
        missing = error["type"] == "missing" and key == given
        if error["type"] == "extra_forbidden":
            wrong[f"unknown key {key!r}{nearest(key, KEYS)}"] = []
        elif missing and key.startswith("task."):  # an experiment set others of a task that task= left out
            task = key.rpartition(".")[0]
            wrong[f"{task} has settings, but task= does not choose it; ~{task} leaves it out"] = []
        elif missing:
            hint = "; a file of your own in a group starts with `defaults: [base]`" if "." in key else ""
            wrong[f"{key} is missing{hint}"] = []
        else:
            said = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ").partition(", unable")[0]
            said = said.replace("Field required", "a longer list")
            wrong.setdefault(f"{key}={error['input']!r} is not allowed: it should be ", []).append(said)
    return [start + " or ".join(dict.fromkeys(said)) for start, said in wrong.items()]


# -- frozen files -----------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_frozen(path: str | Path) -> Config:
    """Read a `config.yaml` written by `to_yaml`."""
    return from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
