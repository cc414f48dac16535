"""Prompts to texts: the base model with all adapters, every row of a batch under its own composition."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from ray import serve
from ray.serve.handle import DeploymentHandle

from lorafleet.adapters import StoredAdapter, stored_adapters
from lorafleet.config import Composing, Settings
from lorafleet.engine import Generation, GenerationRequest, Piece
from lorafleet.errors import AdapterError, RequestError
from lorafleet.fleet import add_adapter, load_engine, make_composition
from lorafleet.models import pick_device
from serve.answering import Answering
from serve.errors import sentence
from serve.follower import Follower, Published
from serve.logs import log_through_serve
from serve.messages import Begun, Completed, Continuation, Ended, Load, News, Order, Weighed
from serve.metrics import GenerationMetrics
from serve.transcript import Transcript, transcribe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafleet.engine import Engine, OnPiece

logger = logging.getLogger("ray.serve")

NICENESS = 10
"""Of an engine on CPUs: gateway, encoder and weigher take milliseconds, and go first."""
PREPARED_SHARE = 1 / 3
"""Of the room for adapters, for forms that requests have prepared. The adapters of the fleet fill the other two thirds."""


@serve.deployment(name="Generator")
class Generator:
    """Generates in the engine's thread: the replica's event loop stays free for requests and health checks."""

    async def __init__(self, settings: Settings, pool: DeploymentHandle) -> None:  # type: ignore[misc]
        """Load the base model and the adapters.

        Raises:
            ModelError: the base model cannot be loaded. An adapter that cannot be is left out, and logged.
        """
        # Not above: whoever deploys the application imports this module, and torch takes seconds.
        import torch

        began = time.monotonic()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        log_through_serve()
        on_cpu = pick_device(settings.models.device).type == "cpu"
        if on_cpu:
            # Ray gives a replica one thread for every CPU that it reserves, and this one reserves less than it uses.
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._settings = settings
        self._roster = stored_adapters(settings)
        self._left_out: dict[str, str] = {}
        gpus = settings.serving.generator.gpus
        self._engine = load_engine(
            settings,
            self._roster,
            niceness=NICENESS if on_cpu else 0,
            gpu_share=gpus if 0 < gpus < 1 else 1.0,
            prepared_share=PREPARED_SHARE,
            leave_out=self._leave_out,
        )
        self._engine.warm_up()
        pages = self._engine.pool.pages
        logger.info(
            "%s with %d adapters, in %s on %s, was loaded in %.1f s; there is room for adapters of %d ranks in all",
            settings.models.base,
            len(self._engine.pool),
            str(pages.dtype).removeprefix("torch."),
            pages.device,
            time.monotonic() - began,
            pages.ranks,
        )
        self._metrics = GenerationMetrics(self._engine, settings.generation.rows)
        self._follower = Follower(pool, "generator", self._take_adapters, left_out=lambda: self._left_out)
        await self._follower.start()

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Change settings without a restart: those of the section `composing`."""
        composing = Composing(**{**self._settings.composing.model_dump(), **user_config})
        self._settings = self._settings.model_copy(update={"composing": composing})

    async def check_ready(self) -> None:
        """Returns once the model is loaded."""

    async def load(self) -> Load:
        """What the engine has to do."""
        return Load(self._engine.running, self._engine.waiting)

    async def text_of(self, tokens: tuple[int, ...]) -> str:
        """A prompt of token ids as text, for retrieval, which reads the beginning of a text alone.

        Raises:
            RequestError: the model has no such token.
        """
        # A token may have a hundred characters: the text of all would be far larger than the request.
        return await asyncio.to_thread(self._text_of, tokens[: self._settings.generation.max_prompt_tokens])

    async def complete(self, order: Order, weighed: Weighed | None = None) -> Completed:
        """Continue one prompt `n` times.

        Args:
            weighed: the weights that retrieval found, where the order has none of its own.

        Raises:
            RequestError: the prompt is empty, or the chat template does not take the conversation.
            UnknownAdapter, CompositionError: the composition cannot be made.
            EngineFull: too many requests wait for a row.
        """
        begun, requests = await self._begin(order, weighed)
        if order.sampling.likeliest is None:
            answers = await generate(self._engine, requests)
            self._metrics.observe(begun.composition, answers)
            return Completed(begun, tuple(Continuation(answer.text, (), ended(answer)) for answer in answers))
        heard: list[list[Piece]] = [[] for _ in requests]
        answers = await generate(self._engine, requests, [pieces.append for pieces in heard])
        self._metrics.observe(begun.composition, answers)
        told = await transcribe(self._engine.tokenizer, answers, heard)
        continuations = (
            Continuation(answer.text, tokens, ended(answer)) for answer, tokens in zip(answers, told, strict=True)
        )
        return Completed(begun, tuple(continuations))

    async def stream(self, order: Order, weighed: Weighed | None = None) -> AsyncIterator[Begun | list[News]]:
        """As `complete`, piece by piece: first how it begins, once the engine has taken it, then news of its answers."""
        begun, requests = await self._begin(order, weighed)
        wanted = order.sampling.likeliest is not None
        transcripts = [Transcript(self._engine.tokenizer) for _ in requests] if wanted else []
        answering = Answering(self._engine, requests)
        whole: list[Generation] = []
        try:
            yield begun
            async for batch in answering:
                whole += [what for _, what in batch if isinstance(what, Generation)]
                # Twenty alternatives to each token are many texts.
                news = await asyncio.to_thread(news_of, batch, transcripts) if wanted else news_of(batch)
                if news:
                    yield news
        finally:
            answering.cancel()
            self._metrics.observe(begun.composition, whole)

    async def _take_adapters(self, published: Published) -> None:
        """Load what has come into the pool, and drop what has left it; rows on their way keep what they have.

        Raises:
            AdapterError: an adapter that is being added cannot be loaded. One that was there already is left out and logged.
        """
        wanted, had = published.loaded.adapters, self._roster.adapters
        for task, adapter in wanted.items():
            if task not in had or had[task].same_weights != adapter.same_weights:
                try:
                    await asyncio.to_thread(self._load_adapter, adapter)
                except AdapterError as error:
                    if task not in published.shown.adapters:
                        raise
                    self._leave_out(task, error)
                else:
                    self._left_out.pop(task, None)
        self._roster = published.loaded
        self._left_out = {task: reason for task, reason in self._left_out.items() if task in wanted}
        # Weights of before must not answer in the place of those that cannot be loaded.
        for task in [task for task in self._engine.pool if task not in wanted or task in self._left_out]:
            self._engine.pool.remove(task)

    def _leave_out(self, task: str, error: AdapterError) -> None:
        self._left_out[task] = sentence(error)
        logger.error("an adapter is left out: %s", sentence(error))

    def _load_adapter(self, adapter: StoredAdapter) -> None:
        from lorafleet.composition import load_adapter

        add_adapter(self._engine, load_adapter(adapter.folder, adapter.task))

    async def _begin(self, order: Order, weighed: Weighed | None) -> tuple[Begun, list[GenerationRequest]]:
        """What an order asks of the engine."""
        choice, sampling = order.choice, order.sampling
        # First: between the look at the roster and the engine nobody may take an adapter away.
        prompt, echo = await asyncio.to_thread(self._read_prompt, order)
        weights = choice.weights
        if weights is None:
            weights = within_reach(weighed.weights if weighed is not None else {}, self._engine.pool)
        composition = make_composition(self._settings, self._roster, weights, choice.method, choice.density)
        request = GenerationRequest(
            prompt,
            composition,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=sampling.stop,
            likeliest=sampling.likeliest or 0,
            tell_prompt=sampling.echo and (sampling.likeliest is not None or sampling.max_tokens == 0),
        )
        return Begun(composition, weighed, echo), choices(request, sampling.n)

    def _read_prompt(self, order: Order) -> tuple[tuple[int, ...], str]:
        """The tokens of an order's prompt, read once for all its answers, and the text that they echo."""
        echo = order.sampling.echo
        prompt = prompt_of(order, self._engine.tokenizer)
        tokens = tuple(self._engine.encode(prompt, whole=echo))
        if not echo:
            return tokens, ""
        return tokens, prompt if isinstance(prompt, str) else self._text_of(prompt)

    def _text_of(self, tokens: tuple[int, ...]) -> str:
        self._engine.check_tokens(tokens)
        return str(self._engine.tokenizer.decode(list(tokens), skip_special_tokens=True))


def news_of(batch: Sequence[tuple[int, Piece | Generation]], transcripts: Sequence[Transcript] = ()) -> list[News]:
    """Turn pieces and ends of answers into a stream's news.

    Args:
        transcripts: of the choices, where their tokens are wanted.
    """
    news = []
    for choice, what in batch:
        if isinstance(what, Generation):
            news.append(News(choice, "", ended=ended(what)))
            continue
        tokens = transcripts[choice].hear(what) if transcripts else ()
        if what.text or tokens:
            news.append(News(choice, what.text, tokens))
    return news


async def generate(
    engine: "Engine", requests: Sequence[GenerationRequest], listeners: "Sequence[OnPiece] | None" = None
) -> list[Generation]:
    """Continue prompts in the engine's thread; with the first that fails, or where nobody waits, all are cancelled.

    Args:
        listeners: one for each request, called from the engine's thread with its pieces.

    Raises:
        RequestError, UnknownAdapter, CompositionError, EngineFull: the engine does not take one of them.
    """
    futures: list[Future[Generation]] = []
    try:
        for request, listener in zip(requests, listeners or [None] * len(requests), strict=True):
            futures.append(engine.submit(request, listener))
        return await asyncio.gather(*map(asyncio.wrap_future, futures))
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def within_reach(weights: Mapping[str, float], loaded: Container[str]) -> Mapping[str, float]:
    """The weights that retrieval found, of the tasks whose adapters are here; none at all are the base model's.

    Who weighs may know of tasks that have no adapter, or of an adapter that is still being loaded here, or has just gone.
    """
    here = {task: weight for task, weight in weights.items() if task in loaded}
    if len(here) == len(weights):
        return here
    total = sum(here.values())
    return {task: weight / total for task, weight in here.items()} if total > 0 else {}


def choices(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """The same request `n` times, with a seed of its own for each where there is one."""
    return [request if request.seed is None else replace(request, seed=request.seed + number) for number in range(n)]


def prompt_of(order: Order, tokenizer: "PreTrainedTokenizerBase") -> str | tuple[int, ...]:
    """An order's prompt as the engine takes it.

    Raises:
        RequestError: the chat template does not take the conversation.
    """
    match order.prompt:
        case str() | (int(), *_):
            return order.prompt
        case conversation:
            return chat_prompt(tokenizer, conversation)


def chat_prompt(tokenizer: "PreTrainedTokenizerBase", conversation: Sequence[tuple[str, str]]) -> str:
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


def ended(generation: Generation) -> Ended:
    """The end of an answer."""
    return Ended(
        generation.finish_reason,
        generation.prompt_tokens,
        len(generation.choices),
        1000 * generation.seconds_waiting,
        1000 * generation.seconds_to_first_token,
    )
