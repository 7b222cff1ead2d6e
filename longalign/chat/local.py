"""A model in this process that keeps what it has read: a later question about a document reads only what is new.

    fed      the ids whose keys and values the cache holds: the last prompt and its answer
    prompt   the ids of the conversation as training would encode it
    common   how far the two agree; the cache is cropped to it, and the model reads prompt[common:]

So nothing needs to know why they differ: a turn taken back, an answer stopped in the middle, ids that an answer
encodes to but was not generated as, or a template that rewrites earlier turns.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from longalign.chat.answer import Answer, Write
from longalign.data.messages import BadSample, Messages
from longalign.errors import UserError
from longalign.evaluate.generate import Generator, Stream
from longalign.schema import Config

PREFILL = 2048  # tokens read at a time: Ctrl-C need not wait for the whole document, nor is a mask of its square needed


class LocalModel:
    """A model folder or hub name, loaded once. Raises UserError if it cannot be."""

    def __init__(self, config: Config):
        self.generator = Generator(config)
        self.context = self.generator.context
        self.max_new_tokens = config.max_new_tokens
        self.forget()

    def forget(self) -> None:
        """Empty the cache."""
        self.cache = DynamicCache(config=self.generator.model.config)
        self.fed: list[int] = []

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The conversation as training encodes it. Raises UserError if it leaves no room for an answer."""
        try:
            prompt = self.generator.prompt_ids(messages)
        except BadSample as error:  # the template's own rules
            raise UserError(str(error)) from None
        if self.context is not None and len(prompt) + self.max_new_tokens > self.context:
            raise UserError(
                f"the prompt has {len(prompt):,} tokens and max_new_tokens={self.max_new_tokens}, but the model's "
                f"context is {self.context:,}; shorten the document, lower max_new_tokens, or in a session take turns "
                "back with /undo or /clear"
            )
        return prompt

    def count(self, messages: Messages) -> int:
        """Tokens of a conversation that ends with a question. Raises UserError as prompt_ids does."""
        return len(self.prompt_ids(messages))

    def answer(self, messages: Messages, write: Write) -> Answer:
        """`write` the answer to the last message as it comes.

        Raises UserError as prompt_ids does, and KeyboardInterrupt when Ctrl-C stopped it; the cache serves after both.
        """
        prompt = self.prompt_ids(messages)
        try:
            with _stoppable() as stopped:
                kept = self._keep(prompt)
                self._read(prompt[:-1], stopped)  # the last one gives the answer's first token
                stream = Stream(self.generator.decode, self.generator.stops, write)
                complete = self._continue(prompt, stream, stopped)
        except BaseException:  # a second Ctrl-C, memory: layers may have stopped at different tokens
            self.forget()
            raise
        if stopped():
            raise KeyboardInterrupt
        return Answer(len(prompt), kept, len(stream.ids), cut=not complete)

    def _keep(self, prompt: list[int]) -> int:
        """Crop the cache to what it shares with the prompt without its last token; returns how many tokens that are."""
        pairs = zip(self.fed, prompt[:-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common < len(self.fed):
            try:
                self.cache.crop(common - len(self.fed))
                self.fed = self.fed[:common]
            except RuntimeError:  # a sliding window or a recurrent state has lost what came before
                self.forget()
        return len(self.fed)

    @torch.inference_mode()
    def _read(self, ids: list[int], stopped: Callable[[], bool]) -> None:
        """Extend the cache to all of `ids`, unless stopped between two pieces."""
        while len(self.fed) < len(ids) and not stopped():
            piece = ids[len(self.fed) : len(self.fed) + PREFILL]
            inputs = torch.tensor([piece], device=self.generator.device)
            self.generator.model(inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.fed = self.fed + piece

    @torch.inference_mode()
    def _continue(self, prompt: list[int], stream: BaseStreamer, stopped: Callable[[], bool]) -> bool:
        """Generate behind a prompt that is read but for its last token; whether the answer came to its end."""
        if stopped():
            return False
        generator = self.generator
        torch.manual_seed(generator.seed)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": generator.temperature}
        if not generator.temperature:  # None, lest transformers warn of what a model's own generation_config carries
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        inputs = torch.tensor([prompt], device=generator.device)
        out = generator.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=self.cache,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=generator.stops,
            pad_token_id=generator.stops[0],
            streamer=stream,
            stopping_criteria=[lambda ids, _: torch.full(ids.shape[:1], stopped(), device=ids.device)],
            **sampling,
        )
        ids = out[0].tolist()
        self.fed = ids[: self.cache.get_seq_length()]
        return ids[-1] in generator.stops


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag, which the function given tells; a second one interrupts at once."""
    pressed = False

    def stop(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
