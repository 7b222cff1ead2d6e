"""The tables and pictures of docs/results.md, from docs/results/*.json alone: `python scripts/results_page.py`.

The page's words are written by hand. What stands between `<!-- begin NAME -->` and `<!-- end -->` is made here.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean
from typing import Any

from results_collect import read
from results_figures import Record, at, columns, speed

from longalign.evaluate.charts import heatmap

ABSENT = "not measured"
SHOWN = "full/balanced/1"  # what the recipe makes: verify, bench and chat are of this run
SUITES = {"0k": "none/packing+weighting", "half": "half/packing+weighting", "full": "full/packing+weighting"}
STRATEGIES = ("naive", "sorted", "packing", "packing+weighting", "balanced")


def load(folder: Path) -> dict[str, Record]:
    """{"full/packing+weighting/1": record}."""
    return {file.stem.replace("_", "/"): read(file) for file in sorted(folder.glob("*.json"))}


# -- tables --------------------------------------------------------------------------------------------------


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def seeds(records: dict[str, Record], row: str) -> list[Record]:
    return [record for name, record in records.items() if name == row or re.fullmatch(re.escape(row) + r"/\d+", name)]


def cell(found: list[float], form: str) -> str:
    """The mean, and the range of several seeds if they differ."""
    if not found:
        return ABSENT
    told, least, most = (format(of(found), form) for of in (mean, min, max))
    return told if least == most else f"{told} ({least} to {most})"


def comparison(records: dict[str, Record], rows: dict[str, str], plain: dict[str, str]) -> str:
    """Rows over every column, and which columns show no more than the spread of seeds. plain: rows without training."""
    wanted = columns(records)
    table, no_difference = [], []
    values = lambda row, of: [v for v in (of(record) for record in seeds(records, row)) if v is not None]
    for label, row in {**plain, **rows}.items():
        count = len(seeds(records, row))
        cells = [cell(values(row, of), form) for of, form in wanted.values()]
        table.append([label, str(count or ABSENT), *("" if row == "untouched" and c == ABSENT else c for c in cells)])
    for name, (of, _) in list(wanted.items())[:7]:
        found = [values(row, of) for row in rows.values()]
        if len(found) > 1 and all(len(one) > 1 for one in found):
            spread = max(max(one) - min(one) for one in found)
            if max(map(mean, found)) - min(map(mean, found)) <= spread:
                no_difference.append(name)
    told = (
        f"\n\nColumns in which no two rows differ by more than the seeds of one row do: {', '.join(no_difference)}."
        if no_difference
        else ""
    )
    return markdown(["", "seeds", *wanted], table) + told


def scores(records: dict[str, Record], row: str, task: str, key: str) -> list[Any]:
    """What the runs of a row have of a task, those that have it."""
    return [found for record in seeds(records, row) if (found := at("eval", "tasks", task, key)(record))]


def title(name: str) -> str:
    return f"{int(name):,}" if name.isdecimal() else name.replace("_", " ")


def by_group(records: dict[str, Record], rows: dict[str, str], task: str, key: str) -> str:
    """Mean scores of a task by length or kind."""
    held = {label: scores(records, row, task, key) for label, row in rows.items()}
    names = list(dict.fromkeys(name for found in held.values() for one in found for name in one))
    if not names:
        return ABSENT
    score = lambda found, name: cell([one[name]["score"] for one in found if name in one], ".2f")
    table = [[label, *(score(found, name) for name in names)] for label, found in held.items()]
    return markdown(["", *map(title, names)], table)


def kinds_by_length(records: dict[str, Record], row: str) -> str:
    """Mean scores of retrieval, every kind at every length."""
    grids = scores(records, row, "retrieval", "grid")
    if not grids:
        return ABSENT
    lengths = list(grids[0])
    score = lambda kind, length: cell([grid[length][kind] for grid in grids], ".2f")
    rows = [[title(kind), *(score(kind, length) for length in lengths)] for kind in grids[0][lengths[0]]]
    return markdown(["", *map(title, lengths)], rows)


def two_gpus(records: dict[str, Record]) -> str:
    one = lambda row: cell([v for v in map(speed, seeds(records, row)) if v], ",.0f")
    found = at("bench", "rows")(records.get("2gpu", {})) or []
    two = {row["settings"]["name"]: row for row in found if "failed" not in row}
    told = lambda s, key, form: format(two[s][key], form) if s in two else ABSENT
    rows = [[s, one(f"full/{s}"), told(s, "tokens_per_s_per_gpu", ",.0f"), told(s, "idle", ".1%")] for s in STRATEGIES]
    return markdown(["tokens/s of a GPU", "one GPU", "two GPUs", "of the time idle"], rows)


def bench(record: Record) -> str:
    report = at("bench")(record)
    if not report:
        return ABSENT
    rows = [row for row in report["rows"] if "failed" not in row]
    shown = [[r["pack"], r["attention"], f"{r['tokens_per_s']:,.0f}", f"{r['of_matmul']:.2f}"] for r in rows]
    return markdown(["a pack of", "attention", "tokens/s", "of the GPU's matmul rate"], shown)


def verified(record: Record) -> str:
    report = at("verify")(record)
    if not report:
        return ABSENT
    result = {True: "ok", False: "failed", None: "not run"}
    told = lambda c: c["detail"] if c["figure"] is None else f"{c['figure']:.1e}"
    return markdown(["check", "figure", ""], [[c["name"], told(c), result[c["passed"]]] for c in report["checks"]])


def transcript(record: Record) -> str:
    talk = at("chat")(record)
    if not talk:
        return ABSENT
    command = next(stage["command"] for stage in record["stages"] if stage["stage"] == "chat")
    right = sum(turn["answer"] == turn["expected"] for turn in talk)
    rows = [[turn[key].replace("|", "\\|").replace("\n", " ") for key in turn] for turn in talk]
    table = markdown(["question", "answer", "as the text has it"], rows)
    return f"    $ {command}\n\n{table}\n\nWord for word right: {right} of {len(talk)}."


def made_by(records: dict[str, Record]) -> str:
    """The commands of everything that stands here, in the order in which they ended."""
    stages = sorted(
        (stage for found in records.values() for stage in found["stages"]), key=lambda stage: stage["ended"]
    )
    return "\n".join(f"    $ {s['command']}\n    # {s['seconds']:,.0f} s, {s['machine']}" for s in stages) or ABSENT


def data(record: Record) -> str:
    tables = at("tables")(record)
    if not tables:
        return ABSENT
    row = lambda t: [f"{t[key]:,}" for key in ("samples", "long_samples", "tokens", "targets", "longest")]
    head = ["", "samples", "long", "tokens", "targets", "longest"]
    told = markdown(head, [[name, *row(tables[name])] for name in sorted(tables)])
    for part, packages in record["packages"].items():
        listed = (f"{p['name']} {p['version']} ({p['licence']}; {p['documents']:,}, {p['tokens']:,})" for p in packages)
        told += f"\n\nPackages of {part} (licence; documents, tokens): {', '.join(listed)}."
    return told


# -- pictures ------------------------------------------------------------------------------------------------


def needles(records: dict[str, Record], images: Path) -> str:
    links = []
    shown = {"untouched": "untouched", "continued": "base", "aligned": SHOWN}
    for label, name in shown.items():
        summary = at("eval", "tasks", "needle")(records.get(name))
        if summary:
            heatmap(summary, images / f"results-needle-{label}.png", f"needle, {label}")
            links.append(f"![needle, {label}](images/results-needle-{label}.png)")
    return "\n".join(links) or ABSENT


def curves(records: dict[str, Record], images: Path) -> str:
    """Training losses by length bucket, a line per strategy (its first seed), each the mean of ten."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {s: at("train", "metrics", "loss_by_length")(records.get(f"full/{s}/1")) for s in STRATEGIES}
    found = {strategy: losses for strategy, losses in found.items() if losses}
    if not found:
        return ABSENT
    order = ("<1k", "1k-4k", "4k-16k", "16k-64k", ">=64k")
    buckets = [b for b in order if any(b in losses for losses in found.values())]
    figure, axes = plt.subplots(1, len(buckets), figsize=(3.4 * len(buckets), 3.2), layout="constrained", squeeze=False)
    for place, bucket in zip(axes[0], buckets, strict=True):
        for strategy, losses in found.items():
            points = [(n, v) for n, v in enumerate(losses.get(bucket, []), 1) if v is not None]
            means = [mean(v for _, v in points[max(end - 10, 0) : end]) for end in range(1, len(points) + 1)]
            place.plot([n for n, _ in points], means, label=strategy)
        place.set_title(f"samples of {bucket} tokens", fontsize=9)
        place.set_xlabel("optimizer step")
    axes[0][0].set_ylabel("loss (sequence), mean of ten")
    axes[0][-1].legend(fontsize=7)
    figure.savefig(images / "results-loss.png", dpi=130)
    plt.close(figure)
    return "![loss by length](images/results-loss.png)"


# -- the page ------------------------------------------------------------------------------------------------


def write(folder: Path, page: Path, words: Path) -> None:
    """Fill the marked places of `words`, and write it to `page`, its pictures beside it."""
    records, images = load(folder), page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    shown = records.get(SHOWN, {})
    plain = {"untouched": "untouched", "continued training alone": "base"}
    strategies = {strategy: f"full/{strategy}" for strategy in STRATEGIES}
    every = {**plain, **{f"{suite} long": row for suite, row in SUITES.items() if suite != "full"}, **strategies}
    parts = {
        "data": data(records.get("data", {})),
        "suites": comparison(records, SUITES, plain),
        "strategies": comparison(records, strategies, plain),
        "needle-by-length": by_group(records, every, "needle", "by_length"),
        "retrieval-by-length": by_group(records, every, "retrieval", "by_length"),
        "retrieval-by-kind": by_group(records, every, "retrieval", "by_kind"),
        "retrieval-kinds-by-length": kinds_by_length(records, SHOWN.rpartition("/")[0]),
        "needles": needles(records, images),
        "curves": curves(records, images),
        "two-gpus": two_gpus(records),
        "bench": bench(shown),
        "verify": verified(shown),
        "chat": transcript(shown),
        "commands": made_by(records),
    }

    def fill(found: re.Match[str]) -> str:
        return f"<!-- begin {found[1]} -->\n{parts[found[1]]}\n<!-- end -->"

    text = words.read_text(encoding="utf-8")
    page.write_text(re.sub(r"<!-- begin (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    docs = Path(__file__).parent.parent / "docs"
    write(docs / "results", docs / "results.md", docs / "results.md")
