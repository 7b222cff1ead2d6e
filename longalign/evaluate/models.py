"""Who is asked: a model in this process, or one behind an OpenAI-compatible API.

Both count tokens, know their context, tell the settings that decide an answer, and answer questions:

    answer(questions, done, keep)     done: places answered before; keep([(place, answer)]) is called as answers come
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longalign.data.messages import Messages
from longalign.errors import UserError
from longalign.evaluate.generate import Generator, batches
from longalign.evaluate.question import Answer, Question
from longalign.model.load import load_config, load_template, load_tokenizer, template_settings
from longalign.schema import Config

Keep = Callable[[list[tuple[int, Answer]]], None]


class Local:
    """A folder or hub name. Its weights are loaded when the first answer is wanted. Raises UserError.

    count_answers: generation.batch_tokens bounds prompts and answers, for prompts that are shorter than their answers.
    """

    def __init__(self, config: Config, count_answers: bool = False):
        self.config, self.count_answers = config, count_answers
        self.template = load_template(config)
        hf = load_config(config).get_text_config()
        self.context: int | None = config.generation.context or getattr(hf, "max_position_embeddings", None)
        self.name = self.template.name

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.config)

    def count_tokens(self, what: str | Messages) -> int:
        if isinstance(what, str):
            return len(self.template.tokenizer(what, add_special_tokens=False, verbose=False)["input_ids"])
        return len(self.template.prompt_ids(what))

    def settings(self) -> dict[str, Any]:
        model = self.config.model
        files = sorted(f for pattern in ("*.safetensors", "*.bin", "*.json") for f in Path(model.path).glob(pattern))
        return {
            "model": model.model_dump(include={"path", "tokenizer", "dtype", "init", "rope", "config"}),
            # weights that were trained anew in the same place are another model
            "files": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
            "init_from": self.config.init_from,
            **template_settings(self.config),
            **_sampling(self.config),
        }

    def answer(self, questions: Sequence[Question], done: set[int], keep: Keep) -> None:
        """Batches are planned over all questions, and one that lacks an answer runs whole.

        So a run that was interrupted makes the batches, and draws the samples, of one that was not.
        """
        prompts = [self.template.prompt_ids(question.messages) for question in questions]
        for limit in sorted({question.max_new_tokens for question in questions}, reverse=True):
            places = [place for place, question in enumerate(questions) if question.max_new_tokens == limit]
            lengths = [len(prompts[place]) + limit * self.count_answers for place in places]
            for batch in batches(lengths, self.config.generation.batch_tokens):
                asked = [places[n] for n in batch]
                if done.issuperset(asked):
                    continue
                start = time.monotonic()
                answers = self.generator.generate([prompts[place] for place in asked], limit)
                seconds = round((time.monotonic() - start) / len(asked), 3)
                keep(
                    [
                        (place, self._answer(ids, limit, len(prompts[place]), seconds))
                        for place, ids in zip(asked, answers, strict=True)
                        if place not in done
                    ]
                )

    def _answer(self, ids: list[int], limit: int, prompt_tokens: int, seconds: float) -> Answer:
        finish = "length" if len(ids) >= limit else "stop"
        return Answer(self.generator.decode(ids), finish, prompt_tokens, seconds)


class Endpoint:
    """A server. model.tokenizer counts its tokens, which matters where prompts are built or cut to a length."""

    TEMPLATE = 64  # tokens that a server's template may add, at a guess

    def __init__(self, config: Config, output: Path):
        self.config, self.output = config, output
        try:
            self.tokenizer = load_tokenizer(config)
        except UserError as error:
            raise UserError(f"{error}. With model.endpoint it only counts tokens: any similar one will do") from None
        self.context = config.generation.context
        self.name = "the server's"

    def count_tokens(self, what: str | Messages) -> int:
        if isinstance(what, str):
            return len(self.tokenizer(what, add_special_tokens=False, verbose=False)["input_ids"])
        return self.TEMPLATE + sum(self.count_tokens(message["content"]) for message in what)

    def settings(self) -> dict[str, Any]:
        endpoint = self.config.endpoint
        return {**endpoint.model_dump(include={"base_url", "model", "extra_body"}), **_sampling(self.config)}

    def answer(self, questions: Sequence[Question], done: set[int], keep: Keep) -> None:
        """Raises UserError if no request can succeed. A question that fails alone has the answer None."""
        asyncio.run(self._answer(questions, done, keep))

    async def _answer(self, questions: Sequence[Question], done: set[int], keep: Keep) -> None:
        from longalign.llm import Client, NoReply  # the API's library: most of a second that training ranks save

        endpoint = self.config.endpoint
        seed = {"seed": self.config.seed} if self.config.temperature else {}

        async def ask(place: int) -> None:
            question, start = questions[place], time.monotonic()
            prompt_tokens = self.count_tokens(question.messages)
            try:
                reply = await client.reply(question.messages, max_tokens=question.max_new_tokens)
                finish = reply["finish_reason"] or "stop"
                text, prompt_tokens = reply["text"] or reply["refusal"] or "", reply["input_tokens"] or prompt_tokens
            except NoReply as error:
                finish, text = f"{error.reason}: {error.detail}", None
            keep([(place, Answer(text, finish, prompt_tokens, round(time.monotonic() - start, 3)))])

        client = Client(
            section="endpoint",
            base_url=str(endpoint.base_url),
            extra_body={**endpoint.extra_body, **seed},
            temperature=self.config.temperature,
            max_tokens=None,
            cache=self.output / ".answers" / "api",
            **endpoint.model_dump(include={"model", "api_key_env", "timeout_s", "retries", "concurrency"}),
        )
        async with client:
            await client.map(ask, [place for place in range(len(questions)) if place not in done])


def _sampling(config: Config) -> dict[str, Any]:
    return {"temperature": config.temperature, **({"seed": config.seed} if config.temperature else {})}
