"""A running endpoint under load, driven by Locust.

    python -m benchmarks.load --url http://127.0.0.1:8000
    python -m benchmarks.load --url http://127.0.0.1:8000 --seconds 0 --crowd 200      only past the bound

Steady: clients that ask one question after the other, each in another way: compositions, methods and weighers, chat and
completions, streamed and whole. Some hang up. Some ask for one token alone: what they wait beyond queue and first token is
what gateway, retriever and weigher cost. Afterwards the engines may hold nothing any more, by the gauges of Ray's exporters.

Past the bound: a crowd that comes at once, and comes back when Retry-After says so. It may be told 200, 429 or 503 and
nothing else, and a plain request has to be answered soon after the crowd has left. To pass the bounds, let the endpoint have
small ones (generation.waiting=16).

Ends with 1 where anything was answered otherwise than it should be, or is still held.
"""

# Locust is imported before all that opens sockets: it puts its own in their place.
from locust import HttpUser, constant, task
from locust.clients import ResponseContextManager
from locust.env import Environment

# isort: split
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import gevent
import psutil
import requests
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.report import tell
from lorafleet.network import bypass_proxies

console = Console(stderr=True)

QUESTIONS = (
    "Where can I buy a tennis ball?",
    "Why do cats purr?",
    "Is it safe to eat snow?",
    "What should I do if I lock my keys in the car?",
    "The soup was too salty. What was the cook's most likely mistake, and how can it be saved?",
    "Is this review positive or negative? 'Two hours of my life that nobody will give back to me.'",
    "How do I get red wine out of a white tablecloth without ruining the cloth?",
    "The boy dropped the glass on the stone floor. What happened next: did it bounce, or did it break? Say why.",
    "A ship leaves the harbour at noon with the tide and sails against the wind. Explain why it cannot sail straight ahead, "
    "and what the crew does instead.",
    "My neighbour's tomatoes ripen two weeks before mine, though we planted them on the same day and water them alike. His "
    "bed is against a white wall that faces south, mine stands behind a hedge. What is the likely reason?",
    "Passage: The first lighthouse at the cape was built of wood and burned down within ten years. The second, of granite, "
    "took nine summers, since stones could be landed only in calm weather. Its lamp was lit in 1811 and can be seen from "
    "twenty miles away. Question: was the second lighthouse finished before 1815? Answer yes or no, and give the sentence "
    "that says so.",
    "I have an old wooden chair whose seat wobbles when someone sits down. The legs are firm, the glue in two of the joints "
    "has turned to powder, and one of the screws below the seat turns without end. I own a hammer, a screwdriver, some wood "
    "glue, matches and a rope. Describe step by step, in the right order, how I can mend the chair in an afternoon, and "
    "when it can be sat on again.",
)
METHODS = ("linear", "cat", "ties", "magnitude_prune", "dare_linear", "svd")
WEIGHERS = ("nucleus", "top_k", "softmax", "uniform")
KINDS = ("auto", "base", "adapter", *METHODS, *WEIGHERS)
ONE_TOKEN_SHARE = 0.2
FEWEST_TOKENS, MOST_TOKENS = 8, 32
CROWD_TOKENS = 4
PATIENCE_SECONDS = 150
EMPTY_SECONDS = 60
"""In which the endpoint has to be empty once nobody asks any more; Ray tells its gauges every 10 s."""
RECOVERY_SECONDS = 30
EXPORTERS = Path("/tmp/ray/session_latest/prom_metrics_service_discovery.json")
SAMPLES = 30
RAY_PROGRAMS = ("raylet", "gcs_server")
GAUGES = ("ray_lorafleet_requests_in_flight", "ray_lorafleet_requests_waiting", "ray_lorafleet_rows_running")
REFUSALS = (429, 503)
OVERHEAD = "beside the engine"
ONE_TOKEN = ", one token"
Outcome = Literal["answered", "hung up", "refused", "failed"]


@dataclass(frozen=True)
class Heard:
    """What a client has heard to one request.

    Attributes:
        why: the status where it is another than 200, or what is wrong with the answer.
        first_ms: from the request to the first text of a stream.
        tokens: of the answer.
        timings: as the answer tells them.
        retry_after: of a refusal, in seconds, where it says so.
        shaped: of a refusal, whether it has OpenAI's shape.
        at: when, in seconds of this machine's clock.
    """

    kind: str
    outcome: Outcome
    milliseconds: float
    why: str = ""
    first_ms: float | None = None
    tokens: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)
    retry_after: float | None = None
    shaped: bool = True
    at: float = field(default_factory=time.perf_counter)


class Faulty(Exception):
    """An answer of status 200 that is none; the text says why."""


class Client(HttpUser):
    """A client that asks again as soon as it is answered."""

    abstract = True
    wait_time = constant(0)
    adapters: ClassVar[Sequence[str]] = ()
    heard: ClassVar[list[Heard]]
    hang_ups: ClassVar[float] = 0.0
    numbers: ClassVar[Iterator[int]] = count()

    def on_start(self) -> None:
        """Draw otherwise than the others."""
        self.draws = random.Random(next(self.numbers))

    def ask(self, kind: str, path: str, body: Mapping[str, Any], hang_up: bool = False) -> Heard:
        """Send a request, and note what comes; of a stream that is hung up on, the first chunk is awaited."""
        start = time.perf_counter()
        impatient = hang_up and not body["stream"]
        wait = self.draws.uniform(0.1, 1.0) if impatient else PATIENCE_SECONDS
        with self.client.post(path, json=body, stream=True, timeout=(10, wait), catch_response=True, name=kind) as response:
            try:
                heard = self._listen(kind, response, body, start, hang_up)
            except (requests.RequestException, Faulty) as error:
                left = impatient and isinstance(error, (requests.Timeout, requests.ConnectionError))
                heard = Heard(kind, "hung up" if left else "failed", since(start), why=f"{type(error).__name__}: {error}")
            if response.raw is not None:
                response.close()
            if heard.outcome == "failed":
                response.failure(heard.why)
            else:
                response.success()
        self.heard.append(heard)
        return heard

    def _listen(
        self, kind: str, response: ResponseContextManager, body: Mapping[str, Any], start: float, hang_up: bool
    ) -> Heard:
        if response.error is not None:
            raise response.error
        status = response.status_code
        if status != 200:
            outcome: Outcome = "refused" if status in REFUSALS else "failed"
            after, shaped = response.headers.get("Retry-After"), openai_shaped(response.text)
            return Heard(
                kind, outcome, since(start), str(status), retry_after=None if after is None else float(after), shaped=shaped
            )
        if not body["stream"]:
            answer = response.json()
            tokens = answer["usage"]["completion_tokens"]
            return Heard(kind, "answered", since(start), tokens=tokens, timings=answer["timings"])
        first, last = None, {}
        for chunk in chunks_of(response.iter_lines()):
            if hang_up:
                return Heard(kind, "hung up", since(start))
            if first is None and any(text_of(choice) for choice in chunk["choices"]):
                first = since(start)
            last = chunk
        return Heard(kind, "answered", since(start), "", first, last["usage"]["completion_tokens"], last["timings"])


class Asker(Client):
    """One of the steady clients: every request in another way."""

    heard: ClassVar[list[Heard]] = []

    @task
    def ask_anything(self) -> None:
        """One request."""
        draws = self.draws
        kind = draws.choice(KINDS)
        alone, chat = draws.random() < ONE_TOKEN_SHARE, draws.random() < 0.5
        streamed = not alone and draws.random() < 0.5
        question = draws.choice(QUESTIONS)
        body: dict[str, Any] = {
            "max_tokens": 1 if alone else draws.randint(FEWEST_TOKENS, MOST_TOKENS),
            "stream": streamed,
            **({"messages": [{"role": "user", "content": question}]} if chat else {"prompt": question}),
            **({"stream_options": {"include_usage": True}} if streamed else {}),
            **composed(kind, self.adapters, draws),
        }
        path = "/v1/chat/completions" if chat else "/v1/completions"
        self.ask(kind + ONE_TOKEN if alone else kind, path, body, draws.random() < self.hang_ups)


class OneOfTheCrowd(Client):
    """Asks for little, and comes back when it is told to."""

    heard: ClassVar[list[Heard]] = []

    @task
    def ask_shortly(self) -> None:
        """One request."""
        kind = self.draws.choice(("auto", "base", "linear"))
        body = {"prompt": self.draws.choice(QUESTIONS[:4]), "max_tokens": CROWD_TOKENS, "stream": self.draws.random() < 0.5}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        heard = self.ask(kind, "/v1/completions", {**body, **composed(kind, self.adapters, self.draws)})
        gevent.sleep(heard.retry_after or 0)


def main(
    url: Annotated[str, typer.Option(help="of the endpoint")] = "http://127.0.0.1:8000",
    exporters: Annotated[Path, typer.Option(help="the file in which Ray names its exporters of metrics")] = EXPORTERS,
    clients: Annotated[int, typer.Option(help="steady ones")] = 16,
    seconds: Annotated[float, typer.Option(help="how long they ask; 0 for not at all")] = 120,
    hang_ups: Annotated[float, typer.Option(help="share of the steady requests that are hung up on")] = 0.1,
    crowd: Annotated[int, typer.Option(help="clients that come at once; 0 for none")] = 0,
    crowd_seconds: Annotated[float, typer.Option(help="how long they stay")] = 20,
    processes: Annotated[
        bool, typer.Option("--processes", help="watch the memory of the endpoint's processes, which are on this machine")
    ] = False,
    to: Annotated[Path | None, typer.Option("--json", help="write what was measured to this file")] = None,
) -> None:
    """Drive the endpoint, and print tables."""
    bypass_proxies()
    Client.adapters, Client.hang_ups = adapters_of(url), hang_ups
    measured: dict[str, Any] = {"url": url, "adapters": len(Client.adapters)}
    faults: list[str] = []
    if seconds:
        memory: dict[str, list[float]] = {}
        watching = gevent.spawn(watch, memory, seconds / SAMPLES) if processes else None
        took = drive(Asker, url, clients, seconds, to_the_end=True)
        measured["steady"] = steady(Asker.heard, clients, took, faults)
        measured["held"] = held(exporters, faults)
        if watching is not None:
            watching.kill()
            measured["mebibytes"] = memory
            measured["zombies"] = zombies(faults)
    if crowd:
        drive(OneOfTheCrowd, url, crowd, crowd_seconds, to_the_end=False)
        measured["crowd"] = crowded(OneOfTheCrowd.heard, crowd, crowd_seconds, faults)
        measured["recovered_seconds"] = recovery(url, faults)
        measured["held_by_the_crowd"] = held(exporters, faults)
    measured["faults"] = faults
    report(measured, to)
    raise typer.Exit(1 if faults else 0)


def adapters_of(url: str) -> list[str]:
    """The names of the endpoint's adapters."""
    try:
        models = requests.get(f"{url}/v1/models", timeout=30).json()["data"]
    except (requests.RequestException, ValueError, KeyError) as error:
        raise SystemExit(f"no endpoint answers at {url}: {type(error).__name__}. Start one: lorafleet up") from None
    adapters = [model["id"] for model in models if model["id"] not in ("auto", "base")]
    if len(adapters) < 2:
        raise SystemExit(f"the endpoint at {url} has {len(adapters)} adapters, and compositions take two. Train some more")
    return adapters


def drive(kind: type[Client], url: str, clients: int, seconds: float, to_the_end: bool) -> float:
    """Let clients ask; gives the seconds until the last has its answer, or, where they just leave, until then."""
    environment = Environment(user_classes=[kind], host=url)
    environment.stop_timeout = PATIENCE_SECONDS if to_the_end else 0
    runner = environment.create_local_runner()
    console.print(f"{clients} clients for {seconds:.0f} s", style="dim")
    start = time.perf_counter()
    runner.start(clients, spawn_rate=clients)
    gevent.sleep(seconds)
    runner.stop()
    took = time.perf_counter() - start
    runner.quit()
    return took


def composed(kind: str, adapters: Sequence[str], draws: random.Random) -> dict[str, Any]:
    """The model and the composition of a request."""
    if kind in ("auto", "base"):
        return {"model": kind}
    if kind == "adapter":
        return {"model": draws.choice(adapters)}
    if kind in WEIGHERS:
        return {"model": "auto", "composition": {"weigher": kind}}
    chosen = draws.sample(list(adapters), min(3, len(adapters)))
    return {"model": "auto", "composition": {"method": kind, "weights": {name: draws.uniform(0.1, 1) for name in chosen}}}


def chunks_of(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The chunks of a stream, which has to be whole."""
    for line in lines:
        if not line:
            continue
        data = line.removeprefix(b"data: ")
        if data == b"[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise Faulty(f"in the stream: {chunk['error']['message']}")
        yield chunk
    raise Faulty("the stream ends without [DONE]")


def text_of(choice: Mapping[str, Any]) -> str:
    """The text that a chunk adds to a choice."""
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")


def openai_shaped(text: str) -> bool:
    """Whether an error has OpenAI's shape."""
    try:
        return set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError):
        return False


def since(start: float) -> float:
    """Milliseconds."""
    return 1000 * (time.perf_counter() - start)


def steady(heard: Sequence[Heard], clients: int, took: float, faults: list[str]) -> dict[str, Any]:
    """What the steady clients have heard, as numbers."""
    answered = [one for one in heard if one.outcome == "answered"]
    wrong = Counter(one.why for one in heard if one.outcome in ("refused", "failed"))
    faults += [f"steady: {times} times {why}" for why, times in wrong.items()]
    longer = [one for one in answered if not one.kind.endswith(ONE_TOKEN)]
    overheads = [(one, beside_the_engine(one.timings)) for one in answered if one.kind.endswith(ONE_TOKEN)]
    series = {
        "latency": [one.milliseconds for one in longer],
        # They stand in the order in which they were answered.
        "latency, first quarter": [one.milliseconds for one in longer[: len(longer) // 4]],
        "latency, last quarter": [one.milliseconds for one in longer[-(len(longer) // 4) :]],
        "time to first token, streamed": [one.first_ms for one in longer if one.first_ms is not None],
        "queue": [one.timings["queue_ms"] for one in answered],
        "retrieval": [one.timings["retrieval_ms"] for one in answered if one.timings["retrieval_ms"]],
        "weighing": [one.timings["weighing_ms"] for one in answered if one.timings["retrieval_ms"]],
        OVERHEAD: [beside for one, beside in overheads],
        f"{OVERHEAD}, routed": [beside for one, beside in overheads if one.timings["retrieval_ms"]],
        f"{OVERHEAD}, not routed": [beside for one, beside in overheads if not one.timings["retrieval_ms"]],
        f"{OVERHEAD}, as clients see it": [beside + one.milliseconds - one.timings["total_ms"] for one, beside in overheads],
    }
    return {
        "clients": clients,
        "seconds": took,
        "requests": len(heard),
        "hung_up": sum(one.outcome == "hung up" for one in heard),
        "failed": dict(wrong),
        "requests_per_second": len(heard) / took,
        "tokens_per_second": sum(one.tokens for one in answered) / took,
        # Clients that ask again at once are answered more often when they are answered sooner: this is what would fall.
        "by_quarter": quarters(answered, took),
        "milliseconds": {name: percentiles(values) for name, values in series.items() if len(values) > 1},
        "latency_by_kind": {
            kind: percentiles(values)
            for kind in KINDS
            if len(values := [one.milliseconds for one in longer if one.kind == kind]) > 1
        },
    }


def quarters(answered: Sequence[Heard], took: float) -> list[dict[str, float]]:
    """Of each quarter of the time: answers and tokens a second, and the mean latency."""
    start = max(one.at for one in answered) - took if answered else 0.0
    found = []
    for quarter in range(4):
        first, last = (start + part * took / 4 for part in (quarter, quarter + 1))
        these = [one for one in answered if first < one.at <= last]
        found.append(
            {
                "answers_per_second": 4 * len(these) / took,
                "tokens_per_second": 4 * sum(one.tokens for one in these) / took,
                "mean_ms": statistics.fmean(one.milliseconds for one in these) if these else 0.0,
            }
        )
    return found


def watch(memory: dict[str, list[float]], seconds: float) -> None:
    """Note the resident memory of each kind of process every so many seconds, in MiB."""
    while True:
        gevent.sleep(seconds)
        found: Counter[str] = Counter()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if kind := kind_of(process.cmdline()):
                    found[kind] += process.memory_info().rss / 2**20
        for kind, size in found.items():
            memory.setdefault(kind, []).append(round(size, 1))


def kind_of(command: Sequence[str]) -> str | None:
    """What a process is to the endpoint; None for all others."""
    title = " ".join(command)
    for kind in ("Gateway", "Retriever", "Weigher", "Generator", "Pool"):
        if title.startswith(f"ray::ServeReplica:lorafleet:{kind}"):
            return kind
    kinds = {"ray::ProxyActor": "proxy", "ray::ServeController": "controller"}
    named = next((kind for start, kind in kinds.items() if title.startswith(start)), None)
    program = Path(command[0]).name if command else ""
    return named or ("Chroma" if "chroma" in title and " run " in title else program if program in RAY_PROGRAMS else None)


def zombies(faults: list[str]) -> int:
    """How many processes of this machine have ended and nobody has taken notice."""
    found = sum(process.info["status"] == psutil.STATUS_ZOMBIE for process in psutil.process_iter(["status"]))
    if found:
        faults.append(f"{found} zombies")
    return found


def beside_the_engine(timings: Mapping[str, float]) -> float:
    """Of an answer of one token, the milliseconds that were not the engine's."""
    return timings["total_ms"] - timings["queue_ms"] - timings["first_token_ms"]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """How many values there are, and three of their percentiles."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"count": len(values), "p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def crowded(heard: Sequence[Heard], crowd: int, seconds: float, faults: list[str]) -> dict[str, Any]:
    """What the crowd has heard, as numbers."""
    statuses = Counter("200" if one.outcome == "answered" else one.why for one in heard)
    refused = [one for one in heard if one.outcome == "refused"]
    silent = sum(one.retry_after is None for one in refused)
    faults += [f"crowd: {one.why}" for one in heard if one.outcome == "failed"]
    if silent:
        faults.append(f"crowd: {silent} refusals without Retry-After")
    if not refused:
        faults.append("crowd: nobody was refused: the endpoint's bounds are not passed")
    return {
        "clients": crowd,
        "seconds": seconds,
        "statuses": dict(statuses),
        "refusals_without_retry_after": silent,
        "refusals_in_another_shape": sum(not one.shaped for one in refused),
        "milliseconds": {
            outcome: percentiles(values)
            for outcome in ("answered", "refused")
            if len(values := [one.milliseconds for one in heard if one.outcome == outcome]) > 1
        },
    }


def recovery(url: str, faults: list[str]) -> float | None:
    """Seconds until a plain request is answered."""
    start = time.perf_counter()
    status = 0
    while time.perf_counter() - start < RECOVERY_SECONDS:
        body = {"model": "auto", "prompt": QUESTIONS[0], "max_tokens": CROWD_TOKENS}
        status = requests.post(f"{url}/v1/completions", json=body, timeout=RECOVERY_SECONDS).status_code
        if status == 200:
            return time.perf_counter() - start
        gevent.sleep(1)
    faults.append(f"crowd: a plain request is still answered {status} after {RECOVERY_SECONDS} s")
    return None


def held(exporters: Path, faults: list[str]) -> dict[str, float]:
    """What the endpoint still holds, by its own gauges, once they have come to rest."""
    deadline = time.monotonic() + EMPTY_SECONDS
    while True:
        gevent.sleep(5)
        told = gauges(exporters)
        if set(told) == set(GAUGES) and not any(told.values()):
            return told
        if time.monotonic() > deadline:
            faults.append(f"still held {EMPTY_SECONDS} s later, by {exporters}: {told or 'nothing is told of it'}")
            return told


def gauges(exporters: Path) -> dict[str, float]:
    """The gauges of what is on its way, over all replicas."""
    told: Counter[str] = Counter()
    targets = json.loads(exporters.read_text(encoding="utf-8")) if exporters.exists() else []
    for exporter in (exporter for target in targets for exporter in target["targets"]):
        text = requests.get(f"http://{exporter}/metrics", timeout=30).text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        for sample in samples:
            if sample.name in GAUGES:
                told[sample.name] += sample.value
    return dict(told)


def report(measured: Mapping[str, Any], to: Path | None) -> None:
    """Print what was measured."""
    rows: list[Sequence[object]] = []
    titles = []
    if "steady" in measured:
        part = measured["steady"]
        titles.append(
            f"{part['clients']} clients for {part['seconds']:.0f} s: {part['requests']} requests, "
            f"{part['hung_up']} hung up, {sum(part['failed'].values())} failed; "
            f"{part['requests_per_second']:.2f} requests/s, {part['tokens_per_second']:.1f} tokens/s; "
            f"still held: {measured['held']}"
        )
        by_quarter = (
            f"{one['answers_per_second']:.2f} and {one['tokens_per_second']:.1f} ({one['mean_ms']:,.0f})"
            for one in part["by_quarter"]
        )
        titles.append(f"Answers/s, tokens/s (mean latency, ms) by quarter: {', '.join(by_quarter)}")
        rows += [row(name, values) for name, values in part["milliseconds"].items()]
        rows += [row(f"latency, {kind}", values) for kind, values in part["latency_by_kind"].items()]
    if "crowd" in measured:
        part = measured["crowd"]
        titles.append(
            f"{part['clients']} clients at once for {part['seconds']:.0f} s: {part['statuses']}; "
            f"{part['refusals_without_retry_after']} refusals without Retry-After, "
            f"{part['refusals_in_another_shape']} in another shape than OpenAI's; "
            f"a plain request is answered after {measured['recovered_seconds']} s; "
            f"still held: {measured['held_by_the_crowd']}"
        )
        rows += [row(f"the crowd, {name}", values) for name, values in part["milliseconds"].items()]
    tell("\n".join(titles), ("milliseconds", "answers", "p50", "p95", "p99"), rows, measured, to)
    for kind, sizes in measured.get("mebibytes", {}).items():
        third = max(len(sizes) // 3, 1)
        early, late = statistics.median(sizes[:third]), statistics.median(sizes[-third:])
        console.print(f"{kind}: {early:,.0f} MiB in the first third, {late:,.0f} in the last")
    for fault in measured["faults"]:
        console.print(fault, style="red")


def row(name: str, values: Mapping[str, float]) -> tuple[object, ...]:
    """A row of the table."""
    return (name, int(values["count"]), values["p50"], values["p95"], values["p99"])


if __name__ == "__main__":
    typer.run(main)
