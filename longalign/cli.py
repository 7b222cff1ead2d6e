"""The command line: `longalign COMMAND [key=value ...]`. Commands live elsewhere and are imported when called."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from longalign.errors import UserError
from longalign.streams import end_at_once, outlive_readers

app = typer.Typer(
    name="longalign",
    help="Align language models on long context: prepare -> tokenize -> group -> train -> eval -> chat.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def complete_word(incomplete: str) -> list[str]:
    """Shell completion: keys and groups, then the options of a group or a key."""
    from longalign.config import KEYS, allowed_values, groups

    options, key = groups(), incomplete.partition("=")[0]
    if "=" in incomplete:
        return [f"{key}={v}" for v in options.get(key) or allowed_values(key) if f"{key}={v}".startswith(incomplete)]
    sections_too = "." in incomplete  # keys within a section only once one is begun, lest they bury the rest
    keys = (key for key in KEYS if sections_too or "." not in key)
    return [f"{key}=" for key in dict.fromkeys((*options, *keys)) if key.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides of conf/, e.g. model=llama2-7b lr=1e-5", autocompletion=complete_word
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print the composed configuration, and stop.")]
Multirun = Annotated[bool, typer.Option("-m", "--multirun", help="Sweep: key=a,b runs every combination.")]
ConfigDir = Annotated[str | None, typer.Option("--config-dir", help="Folder with configuration groups of your own.")]


def run(name: str, words: list[str], dry_run: bool, show_config: bool, multirun: bool, config_dir: str | None) -> None:
    """Compose, then act: show, sweep, describe or do. Ends the process with the command's exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = _run(name, words, dry_run, show_config, multirun, config_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    raise typer.Exit(code)


def _run(name: str, words: list[str], dry_run: bool, show_config: bool, multirun: bool, config_dir: str | None) -> int:
    from longalign import config as configuration

    if multirun:
        from longalign.sweep import sweep

        return sweep(name, words, config_dir, dry_run)
    config = configuration.compose_config(name, words, config_dir)
    if show_config:
        print(configuration.to_yaml(config), end="")
        return 0
    from longalign import commands

    command: Callable[[Any, bool], int] = getattr(commands, name)
    return command(config, dry_run)


def _command(name: str, summary: str, path_is: str | None = None) -> None:
    """path_is: the key that a word of no key stands for."""

    def command(
        overrides: Overrides = None,
        dry_run: DryRun = False,
        show_config: ShowConfig = False,
        multirun: Multirun = False,
        config_dir: ConfigDir = None,
    ) -> None:
        words = [f"{path_is}={w}" if path_is and _is_path(w) else w for w in overrides or []]
        run(name, words, dry_run, show_config, multirun, config_dir)

    app.command(name, help=summary)(command)


def _is_path(word: str) -> bool:
    """`runs/x` and `runs/lr=1`, but not `watch.once=true`."""
    return "=" not in word or Path(word).exists()


_command(
    "prepare",
    "Write raw conversations: of a hub, of files in other formats, of ShareGPT, asked of a model about documents of "
    "your own, or made up from a seed.",
)
_command("tokenize", "Encode raw conversations into one Arrow table, accounting for every sample.")
_command("group", "Plan which samples share a pack and which packs share a step.")
_command("train", "Train on the plan; groups first if there is none. Ctrl-C saves a checkpoint.")
_command("watch", "Show what a run, or a folder of runs, is doing: longalign watch RUN.", path_is="output_dir")
_command("stats", "Show what tokenised data holds and lost, its lengths, and what each strategy makes of it.")
_command(
    "eval",
    "Measure a model or an endpoint: task=needle, retrieval, longbench_chat, longbench, heldout; or compare=[RUN,RUN].",
)
_command("chat", "Talk to a model: one answer with prompt=, else interactive.")
_command("verify", "Check model, data and this machine: leaks, losses, stop tokens, rope, export. Exit 1 if one fails.")
_command("plan", "Predict hours, tokens/s, memory and money of every strategy, from the lengths of your data.")
_command(
    "bench",
    "Time forward and backward passes: packs x attention backends x activation policies; or steps by strategy.",
)
_command(
    "convert",
    "A .gguf file, or ChatGLM3's original checkpoint layout, to transformers' and, with reverse=true, the latter back.",
)


def main() -> None:
    outlive_readers()
    try:
        app()
    except SystemExit as ending:
        if ending.code == 130:  # worker processes, which Python's own end would wait for, end when this one has
            end_at_once(130)
        raise


if __name__ == "__main__":
    main()
