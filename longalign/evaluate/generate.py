"""Answers of a model in this process, asked with the very ids it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from longalign.data.messages import Messages
from longalign.errors import UserError
from longalign.evaluate.host_cache import host_cache
from longalign.model.load import load_model, load_template, resolve_device, resolve_dtype
from longalign.model.offload import Host
from longalign.schema import Config


class Generator:
    """A model folder or hub name, loaded once, or `model`, one in memory. Raises UserError if it cannot be loaded."""

    def __init__(self, config: Config, model: Any = None):
        self.device = resolve_device(config)
        if config.generation.cache == "offloaded" and self.device == "cpu":
            raise UserError("generation.cache=offloaded needs a GPU; a CPU holds keys and values in main memory anyway")
        self.template = load_template(config)
        self.tokenizer = self.template.tokenizer
        self.model = model or load_model(config, resolve_dtype(config, self.device)).to(self.device).eval()
        also = self.model.generation_config.eos_token_id  # GLM-4 ends an answer with the next role's token
        self.stops = sorted({*self.template.stop_ids, *([also] if isinstance(also, int) else also or [])})
        text_config = self.model.config.get_text_config()
        self.context: int | None = config.generation.context or getattr(text_config, "max_position_embeddings", None)
        self.host = Host()
        self.seed, self.temperature, self.settings = config.seed, config.temperature, config.generation

    def prompt_ids(self, messages: Messages) -> list[int]:
        return self.template.prompt_ids(messages)

    @torch.no_grad()  # not inference_mode: weights that ZeRO-3 gathers in it could not be trained on
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        streamer: BaseStreamer | None = None,
        width: int = 0,
        synced: bool = False,
    ) -> list[list[int]]:
        """Token ids of the answers, without the tokens that end them. Padding goes to the left and is masked.

        A prompt of n tokens is run generation.prefill_chunk_size tokens at a time. Raises UserError out of memory.
        synced: all ranks call this at once with the same `width`, the tokens that prompts are padded to at least, and
        run equally often forward: as often as the one with the longest answer.
        """
        pad, longest = self.stops[0], max(width, *map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        torch.manual_seed(self.seed)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": self.temperature}
        if not self.temperature:  # None, lest transformers warn of what a model's own generation_config carries
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        chunk = self.settings.prefill_chunk_size
        try:
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.stops,
                pad_token_id=pad,
                streamer=streamer,
                prefill_chunk_size=chunk if chunk and chunk < longest else None,
                past_key_values=self._cache(len(prompts), longest + max_new_tokens),
                synced_gpus=synced,
                **sampling,
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory on {len(prompts)} prompts of {longest:,} tokens; lower generation.batch_tokens="
                f"{self.settings.batch_tokens} or prefill_chunk_size={chunk}, or set generation.cache=offloaded"
            ) from None
        answers = []
        for row in out[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in self.stops), len(row))
            answers.append(row[:end])
        return answers

    def _cache(self, prompts: int, tokens: int) -> Any:
        """An empty cache for so many prompts of so many tokens, answers included; None: transformers' default."""
        if self.settings.cache == "dynamic":
            return None
        return host_cache(self.model.config, self.host, prompts, tokens, self.model.dtype)

    def decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.lstrip() if self.template.name == "chatglm3" else text  # its answers begin with an empty line


def batches(lengths: list[int], batch_tokens: int, most: int | None = None) -> list[list[int]]:
    """Places of prompts, longest first, in batches of about `batch_tokens` tokens with padding, of `most` prompts."""
    order, found = sorted(range(len(lengths)), key=lambda place: -lengths[place]), []
    while order:
        size = max(1, min(batch_tokens // lengths[order[0]], most or len(order)))
        found.append(order[:size])
        order = order[size:]
    return found


class Stream(BaseStreamer):
    """Writes an answer as it comes. Holds text back while its last character is incomplete."""

    def __init__(self, decode: Callable[[list[int]], str], stops: list[int], write: Callable[[str], Any]):
        self.decode, self.stops, self.write = decode, set(stops), write
        self.ids: list[int] = []
        self.shown, self.prompt_passed = 0, False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_passed:  # transformers sends the prompt first
            self.prompt_passed = True
            return
        self.ids += [token for token in value.tolist() if token not in self.stops]
        text = self.decode(self.ids)
        if not text.endswith("\ufffd"):
            self.write(text[self.shown :])
            self.shown = len(text)

    def end(self) -> None:
        self.write(self.decode(self.ids)[self.shown :])
