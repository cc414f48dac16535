"""Prompts to texts: the base model with all adapters, every row of a batch under its own composition."""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from jinja2 import TemplateError
from ray import serve
from transformers import PreTrainedTokenizerBase

from lorafleet.adapters import stored_adapters
from lorafleet.composition import Composition
from lorafleet.config import Composing, Settings
from lorafleet.engine import Engine, Generation, GenerationRequest
from lorafleet.errors import RequestError
from lorafleet.fleet import load_engine, make_composition
from lorafleet.models import pick_device
from serve.messages import Completed, Continuation, Order, Sampling, Token, Weighed


@serve.deployment(name="Generator")
class Generator:
    """Generates in the engine's thread: the replica's event loop stays free for requests and health checks."""

    def __init__(self, settings: Settings) -> None:
        """Load the base model and the adapters.

        Raises:
            ModelError, AdapterError: one of them cannot be loaded.
        """
        logging.getLogger("transformers").setLevel(logging.ERROR)
        if pick_device(settings.models.device).type == "cpu":
            # Ray gives a replica one thread for every CPU that it reserves, and this one reserves less than it uses.
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._settings = settings
        self._roster = stored_adapters(settings)
        self._engine = load_engine(settings, self._roster)
        self._engine.warm_up()

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Change settings without a restart: those of the section `composing`."""
        self._settings = self._settings.model_copy(update={"composing": Composing(**user_config)})

    async def check_ready(self) -> None:
        """Returns once the model is loaded."""

    async def complete(self, order: Order, weighed: Weighed | None = None) -> Completed:
        """Continue one prompt `n` times.

        Args:
            weighed: the weights that retrieval found, where the order has none of its own.

        Raises:
            RequestError: the prompt is empty, or the chat template does not take the conversation.
            UnknownAdapter, CompositionError: the composition cannot be made.
            EngineFull: too many requests wait for a row.
        """
        composition = self._composition(order, weighed)
        request = GenerationRequest(self._prompt(order), composition, **_drawing(order.sampling))
        answers = await generate(self._engine, choices(request, order.sampling.n))
        return Completed(
            tuple(Continuation(generation, self._tokens(generation)) for generation in answers),
            composition,
            weighed.retrieval_ms if weighed else 0.0,
            weighed.weighing_ms if weighed else 0.0,
            1000 * max(generation.seconds_waiting for generation in answers),
            1000 * max(generation.seconds_to_first_token for generation in answers),
        )

    def _composition(self, order: Order, weighed: Weighed | None) -> Composition:
        choice = order.choice
        weights = choice.weights if choice.weights is not None else (weighed.weights if weighed else {})
        return make_composition(self._settings, self._roster, weights, choice.method, choice.density)

    def _prompt(self, order: Order) -> str:
        return order.prompt if isinstance(order.prompt, str) else chat_prompt(self._engine.tokenizer, order.prompt)

    def _tokens(self, generation: Generation) -> tuple[Token, ...]:
        """The tokens whose text is in the answer: a stop text takes its own away."""
        tokens, length = [], 0
        for token, log_probability in zip(generation.tokens, generation.log_probabilities, strict=True):
            if length >= len(generation.text):
                break
            text = str(self._engine.tokenizer.decode([token], skip_special_tokens=True))
            tokens.append(Token(text, log_probability))
            length += len(text)
        return tuple(tokens)


async def generate(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Generation]:
    """Continue prompts in the engine's thread; with the first that fails, or where nobody waits, all are cancelled.

    Raises:
        RequestError, UnknownAdapter, CompositionError, EngineFull: the engine does not take one of them.
    """
    futures: list[Future[Generation]] = []
    try:
        for request in requests:
            futures.append(engine.submit(request))
        return await asyncio.gather(*map(asyncio.wrap_future, futures))
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def choices(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """The same request `n` times, with a seed of its own for each where there is one."""
    return [request if request.seed is None else replace(request, seed=request.seed + number) for number in range(n)]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[tuple[str, str]]) -> str:
    """A conversation as the tokenizer's chat template writes it, up to where the answer begins; plain where it has none.

    Raises:
        RequestError: the template does not take the conversation (some want user and assistant in turn).
    """
    if not tokenizer.chat_template:
        return "\n\n".join(text for _, text in conversation)
    messages = [{"role": role, "content": text} for role, text in conversation]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise RequestError(f"messages do not fit the model's chat template: {error}", field="messages") from None


def _drawing(sampling: Sampling) -> dict[str, Any]:
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": sampling.stop,
    }
