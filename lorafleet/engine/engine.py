"""The engine: requests come in from any thread, one thread computes, answers go out as they come."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from importlib.util import find_spec
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafleet.composition import AdapterPool, ComposedModel, Composition, Lease
from lorafleet.engine.base_models import check_layers, hold_rotation
from lorafleet.engine.cache import KeyValueCache
from lorafleet.engine.loop import Loop
from lorafleet.engine.requests import Generation, GenerationRequest, OptionScore, Piece, ScoreRequest
from lorafleet.engine.runner import Runner
from lorafleet.engine.segments import Segment
from lorafleet.engine.sequence import OnPiece, Scoring
from lorafleet.engine.sequence import Sequence as Row
from lorafleet.engine.slotted_cache import SlottedCache
from lorafleet.engine.text import TextStream
from lorafleet.errors import CompositionError, EngineFull, LoRAFleetError, ModelError, RequestError
from lorafleet.prompts import cut_middle, declared_stops, encode_answer, encode_ends, end_tokens

if TYPE_CHECKING:
    from lorafleet.engine.graphs import DecodeGraphs
    from lorafleet.engine.prompt_graphs import PromptGraphs

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.85
"""Of a GPU's free memory, for adapters, keys and values; the rest is for what a pass computes."""
CPU_PREFILL_TOKENS = 512
GPU_PREFILL_TOKENS = 4096
PROMPT_SIZES = (1, 2, 16, 32, 64, 200, 256, 320, 640, 1280, 2048)
Note = Callable[[int], None]
Answer = TypeVar("Answer")


class Engine:
    """Generates and scores on one base model with a pool of adapters, every request under its own composition.

    Args:
        max_prompt_tokens: longer prompts are cut in their middle.
        rows: sequences at once.
        longest: tokens of a sequence at most, prompt and answer together.
        waiting: requests that may wait for a row; more are refused.
        prefill_tokens: tokens of one pass over prompts; the rows on their way wait for no more than that.
        pages, page_rank, prepared_share: of the adapters in memory, as in `AdapterPool`.
        cache_gib: memory for keys and values on a GPU; most of what is free where absent.
        gpu_share: of the GPU's whole memory this engine's, where several processes share it.
        niceness: added to that of the engine's thread; on CPUs, those who compute a little beside it then need not wait.
        remembered: of how many prompts, and of how many options, the tokens are kept, for who asks the same again and again.

    Raises:
        ModelError: the model has layers that the engine cannot compute, or no sequence of that length can be computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int = 2048,
        rows: int = 16,
        longest: int = 4096,
        waiting: int = 256,
        prefill_tokens: int | None = None,
        pages: int = 256,
        page_rank: int = 16,
        prepared_share: float = 1.0,
        cache_gib: float | None = None,
        gpu_share: float = 1.0,
        niceness: int = 0,
        remembered: int = 0,
    ) -> None:
        check_layers(model)
        hold_rotation(model, longest)
        self._tokenizer, self._niceness = tokenizer, niceness
        self._max_prompt_tokens, self._rows, self._waiting = min(max_prompt_tokens, longest - 1), rows, waiting
        self._prompt_tokens = lru_cache(remembered)(partial(encode_ends, tokenizer, max_tokens=self._max_prompt_tokens))
        self._option_tokens = lru_cache(remembered)(lambda option: tuple(encode_answer(tokenizer, option)))
        self._stops = declared_stops(model)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._composed = ComposedModel(model, pages, page_rank, prepared_share)
        device = next(model.parameters()).device
        self._prefill_tokens = prefill_tokens or (GPU_PREFILL_TOKENS if device.type == "cuda" else CPU_PREFILL_TOKENS)
        self._cache, self._graphs, self._prompt_graphs = _for_device(
            model, self._composed, rows, longest, self._prefill_tokens, cache_gib, gpu_share
        )
        self._runner = Runner(model, self._composed, self._cache, self._graphs, self._prompt_graphs)
        self._loop = Loop(
            self._runner,
            self.pool,
            self._cache,
            self._text_of,
            end_tokens(tokenizer, model),
            rows,
            self._prefill_tokens,
            self._wake,
        )
        self._news = threading.Condition()
        self._awake = True
        """Whether the thread has a reason to step: cleared before each step that may find nothing to compute."""
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def pool(self) -> AdapterPool:
        """The adapters that requests may name; they come and go at any time."""
        return self._composed.pool

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self._tokenizer

    @property
    def waiting(self) -> int:
        """How many requests wait for a row."""
        return self._loop.waiting

    @property
    def running(self) -> int:
        """How many rows are on their way."""
        return self._loop.running

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values take."""
        return self._cache.bytes

    def warm_up(self) -> None:
        """Make ready what the first requests would wait for, once the adapters are in; nothing to do on a CPU."""
        if self._graphs is None or self._prompt_graphs is None:
            return
        with torch.inference_mode():
            # The largest first: the graphs share their memory.
            self._prompt_graphs.warm_up()
            self._graphs.warm_up()
            self._warm_up_prompts()

    def _warm_up_prompts(self) -> None:
        """Have every kernel compiled that a pass over prompts may need, with adapters and without."""
        leases: list[Lease | None] = [None]
        for name in list(self.pool)[:1]:
            leases.append(self.pool.lease(self.pool.recipe(Composition("cat", {name: 1.0}))))
        for tokens in (size for size in PROMPT_SIZES if size <= min(self._prefill_tokens, self._cache.longest)):
            room = self._cache.reserve(tokens, passing=True)
            for lease in leases:
                self._runner.prefill([Segment([0] * tokens, 0, room, lease, [tokens - 1])])
            self._cache.release(room)
        for lease in leases:
            if lease is not None:
                self.pool.release(lease)

    def submit(
        self, request: GenerationRequest, on_piece: OnPiece | None = None, patient: bool = False
    ) -> "Future[Generation]":
        """Ask for a continuation. To cancel the future frees what the request holds, at the next step.

        Args:
            on_piece: is called from the engine's thread with every piece of the answer; it must not block.
            patient: wait however many there are.

        Raises:
            RequestError: the prompt is empty, a bound is out of range, or prompt and answer are too long.
            UnknownAdapter, CompositionError: the composition cannot be made from the pool.
            EngineFull: too many requests wait.
        """
        request.check()
        prompt = self.encode(request.prompt, whole=request.tell_prompt)
        if len(prompt) + request.max_tokens > self._cache.longest:
            raise RequestError(
                f"max_tokens is {request.max_tokens}, and the prompt has {len(prompt)} tokens",
                f"Allowed: {self._cache.longest} together (generation.longest)",
                field="max_tokens",
            )
        recipe = self.pool.recipe(request.composition)
        stops = (*request.stop, *self._stops)
        text = TextStream(self._tokenizer, stops) if stops or on_piece else None
        row = Row(request, prompt, recipe, Future(), on_piece, text)
        self._take(row, patient)
        return row.future

    def submit_score(self, request: ScoreRequest, patient: bool = False) -> "Future[list[OptionScore]]":
        """Ask for the log-likelihood of each option; raises as `submit` does."""
        if not request.options or not all(request.options):
            raise RequestError(f"options is {request.options!r}", "Give at least one, none empty", field="options")
        options = [list(self._option_tokens(option)) for option in request.options]
        recipe = self.pool.recipe(request.composition)
        scoring = Scoring(request, self.encode(request.prompt), options, recipe, Future())
        if len(scoring.tokens) > self._cache.longest:
            raise RequestError(
                f"prompt and options have {len(scoring.tokens)} tokens",
                f"Allowed: {self._cache.longest} (generation.longest)",
                field="options",
            )
        self._take(scoring, patient)
        return scoring.future

    def stream(self, request: GenerationRequest) -> Iterator[Piece]:
        """The pieces of an answer as they come; raises as `submit` does. To leave the loop cancels the request."""
        pieces: SimpleQueue[Piece | None] = SimpleQueue()
        future = self.submit(request, on_piece=pieces.put)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            future.result()
        finally:
            future.cancel()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Continue prompts, each under its own composition; the answers come in the order of the requests.

        A row whose adapters overflow has its error in the answer, and the others are whole.

        Raises:
            RequestError, UnknownAdapter, CompositionError: a request cannot be taken; the others are cancelled.
        """
        return _all([partial(self.submit, request, patient=True) for request in requests], failed=_not_computed)

    def score(self, requests: Sequence[ScoreRequest], note: Note | None = None) -> list[list[OptionScore]]:
        """The log-likelihood of every option of every request; a prompt is computed once for all its options.

        Args:
            note: is called with the number of requests done, one by one.
        """
        return _all([partial(self.submit_score, request, patient=True) for request in requests], note)

    def close(self) -> None:
        """End the thread; requests that wait or are on their way fail."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join()

    def encode(self, prompt: str | Sequence[int], whole: bool = False) -> list[int]:
        """A prompt's tokens, as a request may give them in the prompt's place; without the middle where it is too long.

        Any thread may call this. Of a long text only the ends that are kept are tokenized.

        Args:
            whole: refuse a prompt that is too long.

        Raises:
            RequestError: the prompt is empty or too long, or the model has no such token.
        """
        if isinstance(prompt, str):
            read, counted = self._prompt_tokens(prompt)
            tokens = list(read)
        else:
            self.check_tokens(prompt)
            tokens, counted = list(prompt), True
        if whole and len(tokens) > self._max_prompt_tokens:
            allowed = f"Allowed where it is echoed: {self._max_prompt_tokens} (generation.max_prompt_tokens)"
            count = str(len(tokens)) if counted else f"more than {self._max_prompt_tokens}"
            raise RequestError(f"prompt has {count} tokens", allowed, field="prompt")
        tokens = cut_middle(tokens, self._max_prompt_tokens)
        if not tokens:
            raise RequestError("the prompt is empty", "Send some text", field="prompt")
        return tokens

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            RequestError: there is one.
        """
        foreign = [token for token in tokens if not 0 <= token < self._vocabulary]
        if foreign:
            allowed = f"Allowed: 0 to {self._vocabulary - 1}"
            raise RequestError(f"prompt has the token id {foreign[0]}", allowed, field="prompt")

    def _take(self, item: Row | Scoring, patient: bool) -> None:
        with self._news:
            if self._closed:
                raise EngineFull("the engine is closed", "Ask another one")
            if not patient and self._loop.waiting >= self._waiting + max(0, self._rows - self._loop.running):
                raise EngineFull(f"{self._waiting} requests wait already", "Try again later, or raise generation.waiting")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
            item.future.add_done_callback(self._over)
            self._loop.take(item)
            self._wake()

    @torch.inference_mode()
    def _work(self) -> None:
        # On Linux of this thread, and of those that compute for it, alone.
        os.nice(self._niceness)
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or (self._awake and not self._loop.idle))
                if self._closed:
                    self._loop.abandon(EngineFull("the engine was closed"))
                    return
                self._awake = False
            try:
                if self._loop.step():
                    self._awake = True
            except Exception as error:
                # A fault of ours: those on their way are told, those that come are served.
                logger.exception("a step of the engine failed")
                with self._news:
                    self._loop.abandon(error)

    def _wake(self) -> None:
        with self._news:
            self._awake = True
            self._news.notify_all()

    def _over(self, future: "Future[Any]") -> None:
        """Notify the waiters of a cancelled future, as an executor does; `concurrent.futures.wait` needs it."""
        if future.cancelled():
            future.set_running_or_notify_cancel()
            self._wake()

    def _text_of(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def _for_device(
    model: PreTrainedModel,
    composed: ComposedModel,
    rows: int,
    longest: int,
    prefill_tokens: int,
    cache_gib: float | None,
    gpu_share: float,
) -> "tuple[KeyValueCache[Any], DecodeGraphs | None, PromptGraphs | None]":
    """The cache, and the graphs, that suit the model's device."""
    parameter = next(model.parameters())
    if not parameter.is_cuda or find_spec("triton") is None:
        return SlottedCache(rows, longest, parameter.device), None, None
    # Where there is no GPU, there may be no Triton.
    from lorafleet.engine.capture import GraphMemory
    from lorafleet.engine.fusing import fuse
    from lorafleet.engine.graphs import DecodeGraphs
    from lorafleet.engine.paged_cache import PagedCache
    from lorafleet.engine.prompt_graphs import PromptGraphs

    fuse(model)
    free, whole = torch.cuda.mem_get_info(parameter.device)
    allocated = torch.cuda.memory_allocated(parameter.device)
    # What the others of the same GPU have not taken yet is free now, and theirs.
    free = min(free + torch.cuda.memory_reserved(parameter.device) - allocated, int(whole * gpu_share) - allocated)
    memory = int(cache_gib * 2**30) if cache_gib else int(free * CACHE_SHARE) - composed.pool.pages.bytes
    cache = PagedCache(model.config, memory, longest, parameter.device, parameter.dtype)
    if not composed.by_kernels:
        return cache, None, None
    shared = GraphMemory()
    prompt_graphs = PromptGraphs(model, composed, cache, prefill_tokens, shared)
    return cache, DecodeGraphs(model, composed, cache, rows, shared), prompt_graphs


def _not_computed(error: LoRAFleetError) -> Generation:
    return Generation("", (), "error", 0, 0.0, 0.0, error=error)


def _all(
    submits: Sequence[Callable[[], "Future[Answer]"]],
    note: Note | None = None,
    failed: Callable[[LoRAFleetError], Answer] | None = None,
) -> list[Answer]:
    """Submit everything and wait for it; what goes wrong with one cancels the others.

    Args:
        failed: the answer of a row that overflows; without it, the error is raised.
    """
    futures: list[Future[Answer]] = []
    answers: list[Answer] = []
    try:
        for submit in submits:
            futures.append(submit())
        for future in futures:
            try:
                answers.append(future.result())
            except (CompositionError, ModelError) as error:
                if failed is None:
                    raise
                answers.append(failed(error))
            if note is not None:
                note(1)
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return answers
