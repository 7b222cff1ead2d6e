"""Questions asked of the weights in training (eval_tasks=[needle, ...]), and their answers' scores.

Questions, templates and scores are those of `longalign eval`. Batches are dealt to ranks in rounds: in a round every
rank answers one batch, and under ZeRO-3, where every rank has a part of every weight, all run equally often forward.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longalign.data.plan import read_data
from longalign.errors import UserError
from longalign.evaluate.answers import fitted
from longalign.evaluate.generate import Generator, batches
from longalign.evaluate.models import Local
from longalign.evaluate.question import Question, task_module
from longalign.files import write_text
from longalign.model import attention
from longalign.schema import Config


def as_trained(config: Config) -> Config:
    """The run's config with the template of its data: what the weights in training are asked with."""
    data = read_data(config.data_dir)[1]
    model = config.model.model_copy(update={"chat_template_kwargs": data.get("chat_template_kwargs") or {}})
    return config.model_copy(update={"template": data["template"], "model": model})


def questions_of(config: Config) -> dict[str, list[Question]]:
    """Of every task of eval_tasks but heldout. Raises UserError if they cannot be asked while training."""
    names = [name for name in dict.fromkeys(config.eval_tasks) if name != "heldout"]
    if not names:
        return {}
    local, found = Local(as_trained(config)), dict[str, list[Question]]()
    for name in names:
        settings = getattr(config.task, name)
        if settings is None:
            raise UserError(f"eval_tasks={name}: the task has no settings; add it to the list task=[{name}]")
        task = task_module(name)
        try:
            asked = task.questions(settings, config.seed, local.count_tokens)
            found[name] = [fitted(question, local.context, local.count_tokens) for question in asked]
        except UserError as error:
            raise UserError(f"eval_tasks={name}: {error}") from None
        if any(task.score(question, "", None)["score"] is None for question in found[name]):
            raise UserError(f"eval_tasks={name}: nothing is judged while training; set task.{name}.judge=false")
    return found


def rounds(lengths: list[int], batch_tokens: int, ranks: int) -> list[list[list[int]]]:
    """rounds(...)[round][rank] = places of prompts, of similar length within a round; the last may lack ranks."""
    found = batches(lengths, batch_tokens, most=ceil(len(lengths) / ranks))
    return [found[at : at + ranks] for at in range(0, len(found), ranks)]


class Asked:
    """The questions of a run, and the way to ask them."""

    def __init__(self, config: Config, engine: Any):
        self.questions = questions_of(config)
        self.engine, self.folder = engine, Path(config.output_dir or "") / "answers"
        self.batch_tokens = config.generation.batch_tokens
        self.synced = config.cluster.zero_stage == 3 and dist.get_world_size() > 1
        if self.questions:
            self.generator = Generator(as_trained(config), engine.module.model)

    def measure(self, step: int) -> dict[str, dict[str, Any]]:
        """The columns of a row of eval.jsonl; called by every rank, with the model in eval mode.

        Rank 0 writes a row for every question to answers/TASK-STEP.jsonl, and has the right scores.
        """
        return {name: self._task(name, asked, step) for name, asked in self.questions.items()}

    def _task(self, name: str, questions: list[Question], step: int) -> dict[str, Any]:
        began, task, rows = time.monotonic(), task_module(name), []
        prompts = [self.generator.prompt_ids(question.messages) for question in questions]
        answers = self._answers(questions, prompts)
        for question, prompt, ids in zip(questions, prompts, answers, strict=True):
            answer = self.generator.decode(ids)
            rows.append(
                {
                    "id": question.id,
                    "about": question.about,
                    "prompt_tokens": len(prompt),
                    "reference": question.reference,
                    "answer": answer,
                    "finish": "length" if len(ids) >= question.max_new_tokens else "stop",
                    "scores": task.score(question, answer, None),
                }
            )
        if dist.get_rank() == 0:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self.folder.mkdir(exist_ok=True)
            write_text(self.folder / f"{name}-{step:06d}.jsonl", text)
        cut = sum(row["finish"] == "length" for row in rows)
        seconds = round(time.monotonic() - began, 4)
        return {**task.summarise(rows), "questions": len(rows), "cut_at_limit": cut, "seconds": seconds}

    def _answers(self, questions: list[Question], prompts: list[list[int]]) -> list[list[int]]:
        """Token ids of every answer, on every rank."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        limits = [question.max_new_tokens for question in questions]
        mine: dict[int, list[int]] = {}
        with generating(self.engine):
            for of_ranks in rounds([len(prompt) for prompt in prompts], self.batch_tokens, ranks):
                places = of_ranks[rank] if rank < len(of_ranks) else []
                if not places and not self.synced:
                    continue
                width = max(len(prompts[place]) for batch in of_ranks for place in batch) if self.synced else 0
                # a rank without a question takes part with any prompt
                asked = [prompts[place] for place in places or of_ranks[0][:1]]
                limit = max(limits[place] for place in places) if places else 1
                found = self.generator.generate(asked, limit, width=width, synced=self.synced)
                mine |= zip(places, found, strict=False)
        parts: list[dict[int, list[int]] | None] = [None] * ranks
        dist.all_gather_object(parts, mine)
        whole = {place: ids for part in parts for place, ids in (part or {}).items()}
        return [whole[place][:limit] for place, limit in enumerate(limits)]


@contextmanager
def generating(engine: Any) -> Iterator[None]:
    """The model in training, ready to continue prompts: with transformers' attention, which reads keys and values."""
    model = engine.module.model
    model.set_attn_implementation("sdpa")
    hooks = []
    if hasattr(engine.optimizer, "parameter_offload"):
        # DeepSpeed prefetches weights in the order of the forward before, and takes the outermost module for its start
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        hooks.append(model.register_forward_pre_hook(lambda *_: coordinator.reset_step(), prepend=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(attention.NAME)
