"""Endurance: random requests of every kind from several threads, while adapters come, change and go.

    python -m benchmarks.soak                                  the settings' base model
    python -m benchmarks.soak --model tiny --requests 2000     a random Llama of two layers

Afterwards every answer is computed again, alone, by an engine of one row with the adapters that the request saw, and must be
the same, token for token. Memory must not have grown, and nothing may still be held. Ends with 1 where that is not so.
"""

import ctypes
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from queue import SimpleQueue
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.fleet import WORDS
from lorafleet.composition import METHODS, Adapter, Composition, LowRank
from lorafleet.config import Models
from lorafleet.engine import Engine, GenerationRequest, ScoreRequest
from lorafleet.errors import EngineFull, UnknownAdapter
from lorafleet.models import load_base_model, load_tokenizer
from lorafleet.progress import progress

NAMES = ("amber", "birch", "cedar", "dune", "ember", "fjord")
STOPS = (".", "\n", "e", " a", "th", "st", "\n\nQ")
LONGEST_PROMPT, MOST_TOKENS, LONGEST = 64, 12, 96
ROWS, PAGES, PAGE_RANK = 8, 24, 16
THREADS = 4
CALM_AFTER = 50
"""Answers after which memory should not grow any more."""
ALLOWED_GROWTH = 5.0
"""In percent."""
SAME_SCORE = 1e-3
"""How far two scores may lie apart, in nats a token."""
PATIENCE = 300
"""Seconds; only a fault makes anybody wait so long."""

Request = GenerationRequest | ScoreRequest


@dataclass(frozen=True)
class Plan:
    """What one request will do, drawn beforehand.

    Attributes:
        pause: seconds before it is submitted.
        adapter, change: what happens to the pool before: this adapter is replaced, or removed, or nothing.
        cancel_after: seconds; None where it is not cancelled.
    """

    number: int
    request: Request
    pause: float
    adapter: str
    change: str
    cancel_after: float | None


@dataclass(frozen=True)
class Asked:
    """A request on its way, with the versions of the adapters that it saw."""

    plan: Plan
    versions: Mapping[str, int]
    future: "Future[Any]"


@dataclass
class Report:
    """What came of it.

    Attributes:
        differences: a line for every answer that was not the one given alone.
        calm, end: resident memory in bytes, when it should have stopped to grow and when everything was answered.
        held: rows, slots and pages that nobody gave back.
    """

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    calm: int = 0
    end: int = 0
    held: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_alone: float = 0.0

    @property
    def growth(self) -> float:
        """Of the resident memory, in percent."""
        return 100 * (self.end / self.calm - 1)

    @property
    def fine(self) -> bool:
        """Whether everything is as it should be."""
        return not self.differences and self.growth <= ALLOWED_GROWTH and not any(self.held.values())


class Shelf:
    """The adapters by version. A request and the versions that it sees are known together."""

    def __init__(self, engine: Engine, make: Callable[[str, int], Adapter]) -> None:
        self._engine, self._make = engine, make
        self._latest = dict.fromkeys(NAMES, 0)
        self._lock = threading.Lock()
        for name in NAMES:
            engine.pool.add(make(name, 0))

    def replace(self, name: str) -> None:
        """Put the next version of an adapter in, also where there is none."""
        with self._lock:
            version = self._latest[name] + 1
        # Made outside: the others need not wait for it.
        adapter = self._make(name, version)
        with self._lock:
            if self._latest[name] == version - 1:
                self._latest[name] = version
                self._engine.pool.add(adapter)

    def remove(self, name: str) -> None:
        """Take an adapter out."""
        with self._lock:
            self._engine.pool.remove(name)

    def submit(self, plan: Plan) -> Asked:
        """Submit a request; raises as the engine does."""
        with self._lock:
            versions = {name: self._latest[name] for name in plan.request.composition.weights if name in self._engine.pool}
            return Asked(plan, versions, self._submit(plan.request))

    def _submit(self, request: Request) -> "Future[Any]":
        if isinstance(request, ScoreRequest):
            return self._engine.submit_score(request)
        return self._engine.submit(request)


def plans(requests: int, seed: int, tokenizer: PreTrainedTokenizerBase, unhurried: float) -> Iterator[Plan]:
    """Draw what all requests will do; the pauses between those of one thread are `unhurried` seconds in the mean."""
    draws = random.Random(seed)
    for number in range(requests):
        request = _scoring(draws, tokenizer) if draws.random() < 0.2 else _generation(draws, tokenizer, number)
        change = draws.choices(["", "replace", "remove"], [0.82, 0.16, 0.02])[0]
        cancel_after = draws.expovariate(1 / (4 * unhurried)) if draws.random() < 0.15 else None
        yield Plan(number, request, draws.expovariate(1 / unhurried), draws.choice(NAMES), change, cancel_after)


def _generation(draws: random.Random, tokenizer: PreTrainedTokenizerBase, seed: int) -> GenerationRequest:
    return GenerationRequest(
        _prompt(draws, tokenizer, draws.randint(1, LONGEST_PROMPT)),
        _composition(draws),
        max_tokens=draws.randint(1, MOST_TOKENS),
        temperature=draws.choice([0.0, 0.0, 0.7, 1.0, 1.5]),
        top_p=draws.choice([1.0, 0.9, 0.5]),
        seed=seed,
        stop=tuple(draws.sample(STOPS, draws.choice([0, 0, 1, 3]))),
    )


def _scoring(draws: random.Random, tokenizer: PreTrainedTokenizerBase) -> ScoreRequest:
    options = {" ".join(draws.choices(WORDS, k=draws.randint(1, 2))) for _ in range(draws.randint(1, 3))}
    prompt = _prompt(draws, tokenizer, draws.randint(1, LONGEST_PROMPT))
    return ScoreRequest(prompt, tuple(sorted(options)), _composition(draws))


def _prompt(draws: random.Random, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    """Random words of so many tokens."""
    text = " ".join(draws.choices(WORDS, k=length))
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:length]))


def _composition(draws: random.Random) -> Composition:
    names = draws.sample(NAMES, draws.choice([0, 1, 1, 2, 2, 3]))
    return Composition(
        # svd is decomposed anew for every request, and would take most of the time.
        draws.choices(list(METHODS), [0.3 if method == "svd" else 1.0 for method in METHODS])[0],
        {name: draws.uniform(-1, 1) for name in names},
        draws.choice([0.3, 0.8]),
        draws.choice(["frequency", "total"]),
    )


def soak(
    make_model: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    requests: int = 500,
    seed: int = 0,
    rank: int = 16,
    unhurried: float = 0.01,
) -> Report:
    """Send the requests, and compute every answer again.

    Args:
        make_model: gives the same model every time.
        rank: of the adapters; at most a quarter of the pool's pages.
        unhurried: seconds between two requests of a thread, in the mean.
    """
    report = Report()
    model = make_model()
    engine = Engine(
        model, tokenizer, rows=ROWS, longest=LONGEST, waiting=2 * ROWS, prefill_tokens=64, pages=PAGES, page_rank=PAGE_RANK
    )
    start = time.perf_counter()
    shelf = Shelf(engine, lambda name, version: random_adapter(model, name, version, rank))
    _warm_up(engine, tokenizer)
    answered = _storm(engine, shelf, list(plans(requests, seed, tokenizer, unhurried)), report)
    report.held = still_held(engine)
    report.end = resident_bytes()
    report.seconds = time.perf_counter() - start
    engine.close()
    start = time.perf_counter()
    alone = Engine(make_model(), tokenizer, rows=1, longest=LONGEST, pages=PAGES, page_rank=PAGE_RANK)
    there: dict[str, int] = {}
    with progress("each alone", len(answered)) as bar:
        for asked in sorted(answered, key=lambda asked: asked.plan.number):
            for name, version in asked.versions.items():
                if there.get(name) != version:
                    alone.pool.add(random_adapter(model, name, version, rank))
                    there[name] = version
            report.differences += _compared(alone, asked)
            bar.advance(1)
    alone.close()
    report.seconds_alone = time.perf_counter() - start
    return report


def _warm_up(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let every method, and passes of all sizes, come by once: oneDNN compiles a product for each size, and keeps it."""
    draws = random.Random(0)
    sizes = [*range(1, 17), *range(24, LONGEST_PROMPT, 8)]
    for size, method in zip(sizes, cycle(METHODS), strict=False):
        composition = Composition(method, dict.fromkeys(NAMES[:2], 0.5))
        engine.score([ScoreRequest(_prompt(draws, tokenizer, size), ("a",), composition)])
        engine.generate([GenerationRequest("a", composition, max_tokens=2)] * min(size, ROWS))


def _storm(engine: Engine, shelf: Shelf, planned: list[Plan], report: Report) -> list[Asked]:
    """Submit everything from several threads; what was answered, in no order."""
    ended: SimpleQueue[tuple[str, Asked | Plan]] = SimpleQueue()

    def one_thread(mine: list[Plan]) -> None:
        for plan in mine:
            time.sleep(plan.pause)
            if plan.change == "replace":
                shelf.replace(plan.adapter)
            elif plan.change == "remove":
                shelf.remove(plan.adapter)
            asked = _submitted(shelf, plan)
            if asked is None:
                ended.put(("refused", plan))
                continue
            asked.future.add_done_callback(lambda _, asked=asked: ended.put((_outcome(asked.future), asked)))
            if plan.cancel_after is not None:
                time.sleep(plan.cancel_after)
                asked.future.cancel()

    threads = [threading.Thread(target=one_thread, args=(planned[first::THREADS],)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    answered: list[Asked] = []
    with progress("all together", len(planned)) as bar:
        for place in range(len(planned)):
            outcome, asked = ended.get(timeout=PATIENCE)
            report.counts[outcome] += 1
            if isinstance(asked, Asked) and outcome == "answered":
                answered.append(asked)
            elif isinstance(asked, Asked) and outcome != "cancelled":
                report.differences.append(f"request {asked.plan.number}: {outcome}")
            if place + 1 == min(CALM_AFTER, len(planned)):
                report.calm = resident_bytes()
            bar.advance(1, outcome)
    for thread in threads:
        thread.join()
    return answered


def _submitted(shelf: Shelf, plan: Plan) -> Asked | None:
    """Submit, again and again while the engine is full; None where an adapter is not there."""
    while True:
        try:
            return shelf.submit(plan)
        except EngineFull:
            time.sleep(0.01)
        except UnknownAdapter:
            return None


def _outcome(future: "Future[Any]") -> str:
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    return "answered" if error is None else f"failed: {error!r}"


def _compared(alone: Engine, asked: Asked) -> list[str]:
    """What is different about the answer where the request is the only one: nothing, or one line."""
    request, found = asked.plan.request, asked.future.result()
    where = f"request {asked.plan.number} ({request.composition.method})"
    if isinstance(request, ScoreRequest):
        (scores,) = alone.score([request])
        apart = [abs(one.total - other.total) / one.tokens for one, other in zip(found, scores, strict=True)]
        return [] if max(apart) <= SAME_SCORE else [f"{where}: scores {max(apart):.2g} nats a token apart"]
    (answer,) = alone.generate([replace(request, likeliest=2)])
    if (found.tokens, found.text, found.finish_reason) == (answer.tokens, answer.text, answer.finish_reason):
        return []
    place = next(
        (place for place, pair in enumerate(zip(found.tokens, answer.tokens, strict=False)) if len(set(pair)) > 1), None
    )
    if place is None:
        return [f"{where}: {found.text!r} ({found.finish_reason}), alone {answer.text!r} ({answer.finish_reason})"]
    (_, first), (_, second) = answer.choices[place].likeliest
    return [
        f"{where}, temperature {request.temperature}: token {place} is {found.tokens[place]}, alone {answer.tokens[place]}; "
        f"the two likeliest are {first - second:.2g} nats apart"
    ]


def still_held(engine: Engine) -> dict[str, int]:
    """What an engine without requests does not give out: rows with the longest sequences, and pages of the pool."""
    for name in engine.pool:
        engine.pool.remove(name)
    most = 0
    begun = threading.Semaphore(0)
    request = GenerationRequest(WORDS[0], max_tokens=LONGEST // 2)
    futures = [engine.submit(request, lambda _: begun.release(), patient=True) for _ in range(ROWS)]
    deadline = time.monotonic() + PATIENCE
    while most < ROWS and time.monotonic() < deadline and not all(future.done() for future in futures):
        begun.acquire(timeout=0.1)
        most = max(most, engine.running)
    for future in futures:
        future.cancel()
    try:
        engine.submit(replace(request, max_tokens=1), patient=True).result(PATIENCE)
    except (TimeoutError, CancelledError):
        most = 0
    return {
        "rows": engine.running + engine.waiting,
        "slots": ROWS - most,
        "pages": engine.pool.pages.count - engine.pool.pages.free,
    }


def resident_bytes() -> int:
    """The memory of this process; what it has freed is given back before, where the C library (glibc) keeps some of that."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def random_adapter(model: PreTrainedModel, name: str, version: int, rank: int) -> Adapter:
    """A version of an adapter, the same every time: on all linear layers, every other adapter on attention alone."""
    place = NAMES.index(name)
    draws = torch.Generator().manual_seed(place * 10_000 + version)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws) * 0.05

    layers = {
        module: LowRank(half(rank, layer.in_features), half(layer.out_features, rank), 2.0)
        for module, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and module != "lm_head" and (place % 2 == 0 or "self_attn" in module)
    }
    return Adapter(name, layers)


def tiny_model() -> PreTrainedModel:
    """A Llama of two layers with random weights, the same every time, for bytes as tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes as tokens."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def main(
    model: Annotated[str, typer.Option(help="tiny, base for the settings' base model, or a reference to one")] = "base",
    requests: Annotated[int, typer.Option(help="how many")] = 500,
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
) -> None:
    """Send random requests while adapters come and go, then compare every answer with the one given alone."""
    if model == "tiny":
        report = soak(tiny_model, tiny_tokenizer(), requests, seed)
    else:
        settings = Models(dtype="float32", device="cpu", **({} if model == "base" else {"base": model}))
        report = soak(lambda: load_base_model(settings), load_tokenizer(settings), requests, seed, unhurried=0.3)
    tell(report)
    raise typer.Exit(0 if report.fine else 1)


def tell(report: Report) -> None:
    """Print a report."""
    table = Table("what", "found", title="soak", title_justify="left")
    for outcome in ("answered", "cancelled", "refused"):
        table.add_row(outcome, str(report.counts[outcome]))
    table.add_row("not answered as alone", str(len(report.differences)))
    table.add_row(
        "resident memory", f"{report.calm / 2**20:,.0f} MiB, then {report.end / 2**20:,.0f} MiB: {report.growth:+.1f} %"
    )
    for what, number in report.held.items():
        table.add_row(f"{what} not given back", str(number))
    table.add_row("seconds together, each alone", f"{report.seconds:.1f}, {report.seconds_alone:.1f}")
    console = Console()
    console.print(table)
    for line in report.differences:
        console.print(line, style="red", markup=False)


if __name__ == "__main__":
    typer.run(main)
