"""A model behind an OpenAI-compatible API (vLLM, SGLang, llama.cpp, a provider), its answers streamed."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import openai

from longalign.chat.answer import Answer, Write
from longalign.data.messages import Messages
from longalign.errors import UserError
from longalign.schema import Config


class Endpoint:
    """The model that the server at model.endpoint calls endpoint.model. Raises UserError if there is no key."""

    def __init__(self, config: Config):
        asked, variable = config.endpoint, config.endpoint.api_key_env
        self.at = f"model.endpoint={asked.base_url}, endpoint.model={asked.model}"
        key = os.environ.get(variable, "").strip() if variable else "none"
        if not key:
            raise UserError(
                f"endpoint.api_key_env={variable}: this environment variable holds no key for {asked.base_url}; export "
                "it, or endpoint.api_key_env=null for a server that asks for none"
            )
        retries = min(asked.retries, 2)  # someone is waiting, and can ask again
        self.api = openai.OpenAI(base_url=asked.base_url, api_key=key, timeout=asked.timeout_s, max_retries=retries)
        extra = dict(asked.extra_body)
        if config.model.chat_template_kwargs:  # vLLM and SGLang take them
            extra.setdefault("chat_template_kwargs", config.model.chat_template_kwargs)
        self.request: dict[str, Any] = {
            "model": asked.model,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "stream_options": {"include_usage": True},
            "extra_body": extra,
        }
        self.context = self._context()

    def count(self, messages: Messages) -> None:
        """Unknown before the server has read them."""

    def answer(self, messages: Messages, write: Write) -> Answer:
        """`write` the answer to the last message as it comes. Raises UserError, with what the server said."""
        usage: Any = None
        finish = None
        try:
            body = {**self.request, "messages": messages}
            with self.api.chat.completions.create(stream=True, **body) as stream:
                for chunk in stream:
                    usage = getattr(chunk, "usage", None) or usage
                    for choice in getattr(chunk, "choices", None) or []:
                        finish = choice.finish_reason or finish
                        if choice.delta.content:
                            write(choice.delta.content)
        except openai.APIConnectionError as error:
            raise UserError(
                f"{self.at}: no answer from the server ({error.__cause__ or error}); is it running?"
            ) from None
        except (openai.APIError, ValueError) as error:  # ValueError: a line that is no JSON
            raise UserError(f"{self.at}: {' '.join(str(error).split())[:500]}") from None
        if finish is None:
            raise UserError(f"{self.at}: the server broke off its answer")
        details = getattr(usage, "prompt_tokens_details", None)
        return Answer(
            getattr(usage, "prompt_tokens", None),
            getattr(details, "cached_tokens", None),
            getattr(usage, "completion_tokens", None),
            cut=finish == "length",
        )

    def _context(self) -> int | None:
        """The limit, where a server tells it: vLLM and SGLang do, in their list of models."""
        with suppress(openai.APIError, ValueError, TypeError, AttributeError):
            found = {model.id: model for model in self.api.with_options(timeout=5, max_retries=0).models.list().data}
            return getattr(found.get(self.request["model"]), "max_model_len", None)
        return None
