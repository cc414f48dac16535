"""Faults on purpose: a fleet on a cluster of three nodes is asked without a pause, while parts of it are killed.

    python -m benchmarks.drills --state state
    python -m benchmarks.drills --state state --only generator,chroma
    python -m benchmarks.drills --state state --own-networks        as root, on Linux

The nodes are three raylets of this machine: a head, one with CPUs, and one that says it has a GPU, where two generators run.
The state folder needs an index and adapters (`lorafleet demo` makes both). With `--own-networks` each node has a network of
its own, and Chroma has that of the head; then nodes are cut off, too.

Clients ask the same questions over and over, and do not ask again after an error: every request that is not answered counts.
What an answer has to be is known from before the first fault, so a wrong one is seen. A drill is over when the endpoint has
answered all questions for some seconds and the cluster is at full strength again.

Ends with 1 where an answer was wrong, or a drill never came to an end.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import psutil
import typer
from ray import serve
from rich.console import Console

from benchmarks.nodes import Nodes, OwnNetworks, joined
from benchmarks.report import tell
from lorafleet.cli.service import RAY_ENVIRONMENT
from lorafleet.config import Settings, load_settings
from lorafleet.network import bypass_proxies
from lorafleet.retrieval import server
from serve.app import APPLICATION
from serve.deploy import deploy

console = Console(stderr=True)

STEADY_SECONDS = 8.0
CALM_SECONDS = 8.0
LONGEST_SECONDS = 240.0
CHROMA_AWAY_SECONDS = 5.0
"""For how long a supervisor lets Chroma lie."""
NODE_AWAY_SECONDS = 5.0
CUT_SECONDS = 15.0
"""Shorter than what Ray takes for the end of a node."""
TOKENS = 6
TEXTS = (
    "Where can I buy a tennis ball?",
    "Is it safe to eat snow?",
    "The film was long and dull. Is this review positive or negative?",
)
HEAD = {"num_cpus": 2}
CPU_NODE = {"num_cpus": 2}
GPU_NODE = {"num_cpus": 0, "num_gpus": 1}
Outcome = Literal["answered", "refused", "failed", "wrong"]


@dataclass(frozen=True)
class Heard:
    """What a client heard, and when (monotonic seconds); `why` where it is no answer."""

    question: str
    asked: float
    heard: float
    outcome: Outcome
    why: str = ""


@dataclass
class Clients:
    """Clients that ask all questions in turn, until they are let go."""

    url: str
    questions: Mapping[str, Mapping[str, Any]]
    expected: dict[str, str] = field(default_factory=dict)
    heard: list[Heard] = field(default_factory=list)

    def learn(self) -> None:
        """Ask every question twice, alone; the answers have to be the same ones."""
        with httpx.Client(timeout=300) as http:
            for name, body in self.questions.items():
                first, second = (http.post(f"{self.url}/v1/completions", json=body).raise_for_status() for _ in range(2))
                self.expected[name] = text_of(first)
                assert text_of(second) == self.expected[name], f"{name} is answered in two ways"

    @contextmanager
    def asking(self, clients: int) -> Iterator[None]:
        """So many clients ask meanwhile."""
        over = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(start, over)) for start in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _ask(self, start: int, over: threading.Event) -> None:
        names = list(self.questions)
        with httpx.Client(timeout=150) as http:
            for name in cycle(names[start % len(names) :] + names[: start % len(names)]):
                if over.wait(0.05):
                    return
                asked = time.monotonic()
                outcome, why = self._outcome(http, name)
                self.heard.append(Heard(name, asked, time.monotonic(), outcome, why))

    def _outcome(self, http: httpx.Client, name: str) -> tuple[Outcome, str]:
        try:
            answer = http.post(f"{self.url}/v1/completions", json=self.questions[name])
        except httpx.TransportError as error:
            return "failed", type(error).__name__
        if answer.status_code == 200:
            same = text_of(answer) == self.expected[name]
            return ("answered", "") if same else ("wrong", f"{name}: {text_of(answer)!r}")
        if answer.status_code in (429, 503) and "retry-after" in answer.headers:
            return "refused", str(answer.status_code)
        return "failed", str(answer.status_code)


def text_of(answer: httpx.Response) -> str:
    """The text of a completion."""
    return str(answer.json()["choices"][0]["text"])


@dataclass
class Fleet:
    """The cluster, and the application on it."""

    nodes: Nodes
    settings: Settings
    cpu_node: Any
    gpu_node: Any
    chroma: "subprocess.Popen[bytes]"

    def pids(self, title: str) -> list[int]:
        """Processes of this cluster by the title that Ray gives them."""
        # While it answers, the name of a method stands behind.
        return [process.pid for process in self.nodes.processes() if title_of(process).startswith(title)]

    def kill(self, title: str) -> None:
        """Kill one process of that title, without a word to anybody."""
        os.kill(self.pids(title)[0], signal.SIGKILL)

    def kill_replica(self, deployment: str) -> None:
        """Kill one replica of a deployment."""
        self.kill(f"ray::ServeReplica:{APPLICATION}:{deployment}")

    def replicas(self, deployment: str) -> int:
        """How many replicas of a deployment run."""
        states = serve.status().applications[APPLICATION].deployments[deployment].replica_states
        return int(states.get("RUNNING", 0))

    def whole(self) -> bool:
        """Whether everything runs that should."""
        try:
            application = serve.status().applications[APPLICATION]
        except Exception:
            # The controller is on its way back.
            return False
        return application.status == "RUNNING" and all(one.status == "HEALTHY" for one in application.deployments.values())

    def lose_cpu_node(self) -> None:
        """A machine goes away with all that runs on it, and another one comes."""
        self.nodes.kill(self.cpu_node)
        time.sleep(NODE_AWAY_SECONDS)
        self.cpu_node = self.nodes.add(CPU_NODE)

    def lose_gpu_node(self) -> None:
        """The same with the one of the generators."""
        self.nodes.kill(self.gpu_node)
        time.sleep(NODE_AWAY_SECONDS)
        self.gpu_node = self.nodes.add(GPU_NODE)

    def cut_cpu_node(self) -> None:
        """Nobody reaches a machine for a while, and it reaches nobody."""
        assert isinstance(self.nodes, OwnNetworks)
        self.nodes.cut(self.cpu_node, CUT_SECONDS)

    def cut_gpu_node(self) -> None:
        """The same with the one of the generators."""
        assert isinstance(self.nodes, OwnNetworks)
        self.nodes.cut(self.gpu_node, CUT_SECONDS)

    def lose_chroma(self) -> None:
        """Kill the index's server; a supervisor starts it again."""
        os.kill(self.chroma.pid, signal.SIGKILL)
        self.chroma.wait()
        time.sleep(CHROMA_AWAY_SECONDS)
        self.chroma = start_chroma(self.settings)

    def update(self) -> None:
        """Other settings, which replace every replica."""
        generation = self.settings.generation.model_copy(update={"max_tokens": self.settings.generation.max_tokens + 1})
        self.settings = self.settings.model_copy(update={"generation": generation})
        deploy(self.settings)


def start_chroma(settings: Settings) -> "subprocess.Popen[bytes]":
    """The index's server, on the address of the settings; returns once it answers."""
    host, port = server.address(settings.index.url)
    program = str(Path(sys.executable).with_name("chroma"))
    command = [program, "run", "--path", str(settings.chroma), "--host", host, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not server.answers(settings.index):
        if process.poll() is not None:
            raise RuntimeError("the Chroma server ended at once")
        time.sleep(0.1)
    return process


def title_of(process: psutil.Process) -> str:
    """A process's title; of one that has ended meanwhile, none."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


DRILLS: Mapping[str, tuple[str, Callable[[Fleet], None]]] = {
    "generator": ("a generator of two is killed", lambda fleet: fleet.kill_replica("Generator")),
    "retriever": ("the retriever is killed", lambda fleet: fleet.kill_replica("Retriever")),
    "weigher": ("the weigher is killed", lambda fleet: fleet.kill_replica("Weigher")),
    "gateway": ("the gateway is killed", lambda fleet: fleet.kill_replica("Gateway")),
    "pool": ("the pool is killed", lambda fleet: fleet.kill_replica("Pool")),
    "proxy": ("Serve's HTTP proxy is killed", lambda fleet: fleet.kill("ray::ProxyActor")),
    "controller": ("Serve's controller is killed", lambda fleet: fleet.kill("ray::ServeController")),
    "chroma": (f"Chroma is killed, and started {CHROMA_AWAY_SECONDS:.0f} s later", Fleet.lose_chroma),
    "cpu_node": (f"the CPU node is lost, another joins {NODE_AWAY_SECONDS:.0f} s later", Fleet.lose_cpu_node),
    "gpu_node": (f"the GPU node is lost, another joins {NODE_AWAY_SECONDS:.0f} s later", Fleet.lose_gpu_node),
    "cpu_node_cut": (f"the CPU node's network is away for {CUT_SECONDS:.0f} s", Fleet.cut_cpu_node),
    "gpu_node_cut": (f"the GPU node's network is away for {CUT_SECONDS:.0f} s", Fleet.cut_gpu_node),
    "update": ("all replicas are replaced, by those of other settings", Fleet.update),
}


@dataclass(frozen=True)
class Drilled:
    """What became of a drill.

    Attributes:
        unanswered: by what was heard instead of an answer.
        disturbed_seconds: from the fault to the last request that failed or was refused; 0 where none did.
        whole_seconds: until everything ran again that should; None where that was not seen.
        slowest_seconds: of the answers from the fault on.
    """

    name: str
    what: str
    answered: int
    unanswered: Mapping[str, int]
    wrong: int
    disturbed_seconds: float
    whole_seconds: float | None
    slowest_seconds: float


def drill(name: str, fleet: Fleet, clients: Clients, count: int) -> Drilled:
    """Let clients ask, do it, and wait until it is over."""
    what, do = DRILLS[name]
    clients.heard.clear()
    with clients.asking(count):
        time.sleep(STEADY_SECONDS)
        fault = time.monotonic()
        do(fleet)
        whole_at = None
        while time.monotonic() < fault + LONGEST_SECONDS:
            time.sleep(0.5)
            whole_at = (whole_at or time.monotonic()) if fleet.whole() else None
            if whole_at is not None and calm(clients, whole_at):
                break
    late = [heard for heard in clients.heard if heard.heard > fault]
    bad = [heard for heard in late if heard.outcome in ("failed", "refused")]
    assert not [heard for heard in clients.heard if heard.heard <= fault and heard.outcome != "answered"], "before the fault"
    return Drilled(
        name,
        what,
        sum(heard.outcome == "answered" for heard in late),
        Counter(heard.why for heard in bad),
        sum(heard.outcome == "wrong" for heard in late),
        max((heard.heard for heard in bad), default=fault) - fault,
        None if whole_at is None else whole_at - fault,
        max((heard.heard - heard.asked for heard in late if heard.outcome == "answered"), default=0.0),
    )


def calm(clients: Clients, since: float) -> bool:
    """Whether all questions have been asked and answered since, and nothing else has been heard for some seconds."""
    now = time.monotonic()
    heard = list(clients.heard)
    answered = {one.question for one in heard if one.asked > since and one.outcome == "answered"}
    recent = [one for one in heard if one.heard > now - CALM_SECONDS]
    return (
        now > since + CALM_SECONDS
        and answered == set(clients.questions)
        and bool(recent)
        and all(one.outcome == "answered" for one in recent)
    )


@dataclass(frozen=True)
class Scaled:
    """Autoscaling: seconds until a second generator answered, and until it was gone after the load."""

    up_seconds: float
    down_seconds: float
    answered: int
    unanswered: Mapping[str, int]
    wrong: int


def scale(fleet: Fleet, clients: Clients) -> Scaled:
    """From one generator to two under load, and back."""
    serving = fleet.settings.serving
    generator = serving.generator.model_copy(
        update={
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 2,
            "upscale_delay_seconds": 3,
            "downscale_delay_seconds": 10,
        }
    )
    deploy(fleet.settings.model_copy(update={"serving": serving.model_copy(update={"generator": generator})}))
    clients.heard.clear()
    wait_for(lambda: fleet.whole() and fleet.replicas("Generator") == 1)
    start = time.monotonic()
    with clients.asking(8):
        wait_for(lambda: fleet.replicas("Generator") == 2)
        up = time.monotonic() - start
        time.sleep(STEADY_SECONDS)
    start = time.monotonic()
    with clients.asking(1):
        wait_for(lambda: fleet.replicas("Generator") == 1)
        down = time.monotonic() - start
    outcomes = Counter(heard.outcome for heard in clients.heard)
    bad = Counter(heard.why for heard in clients.heard if heard.outcome in ("failed", "refused"))
    return Scaled(up, down, outcomes["answered"], bad, outcomes["wrong"])


def wait_for(true: Callable[[], bool]) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: it takes too long.
    """
    deadline = time.monotonic() + LONGEST_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("it has not come true")
        time.sleep(0.5)


@contextmanager
def running(settings: Settings, own_networks: bool) -> Iterator[Fleet]:
    """The application on three nodes."""
    with joined(HEAD, own_networks, {"HF_HUB_OFFLINE": "1", **RAY_ENVIRONMENT}) as nodes:
        url = f"http://{nodes.host}:{server.address(settings.index.url)[1]}"
        settings = settings.model_copy(update={"index": settings.index.model_copy(update={"url": url})})
        cpu_node, gpu_node = nodes.add(CPU_NODE), nodes.add(GPU_NODE)
        fleet = Fleet(nodes, settings, cpu_node, gpu_node, start_chroma(settings))
        try:
            deploy(settings)
            yield fleet
            serve.shutdown()
        finally:
            fleet.chroma.kill()
            fleet.chroma.wait()


def questions_of(adapters: list[str]) -> dict[str, dict[str, Any]]:
    """What is asked: each in another way of composing."""
    first, second = adapters[0], adapters[-1]
    ways: dict[str, dict[str, Any]] = {
        "base": {"model": "base"},
        "one adapter": {"model": first},
        "weights": {"model": "auto", "composition": {"method": "cat", "weights": {first: 0.6, second: 0.4}}},
        "nucleus": {"model": "auto"},
        "softmax": {"model": "auto", "composition": {"weigher": "softmax", "method": "cat"}},
    }
    return {
        f"{name} {number}": {**way, "prompt": text, "max_tokens": TOKENS, "temperature": 0, "seed": 0}
        for number, text in enumerate(TEXTS)
        for name, way in ways.items()
    }


def main(
    state: Annotated[Path, typer.Option(help="A state folder with index and adapters")] = Path("state"),
    only: Annotated[str, typer.Option(help=f"Of {', '.join(DRILLS)}, scaling; all where absent")] = "",
    clients: Annotated[int, typer.Option(min=1)] = 4,
    index_port: Annotated[int, typer.Option(help="Where the Chroma server listens meanwhile")] = 8190,
    port: Annotated[int, typer.Option(help="Where the endpoint listens meanwhile")] = 8191,
    own_networks: Annotated[bool, typer.Option("--own-networks", help="Of every node; needs root")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="The same as JSON")] = None,
) -> None:
    """Kill what there is to be killed."""
    bypass_proxies()
    possible = [name for name in [*DRILLS, "scaling"] if own_networks or not name.endswith("_cut")]
    chosen = [name for name in possible if not only or name in only.split(",")]
    settings = load_settings(
        state=state.resolve(),
        models={"dtype": "float32"},
        index={"url": f"http://127.0.0.1:{index_port}", "patience_seconds": 20},
        serving={
            "port": port,
            "generator": {"min_replicas": 2, "max_replicas": 2, "gpus": 0.5},
            "retriever": {"cpus": 1},
        },
    )
    done: list[Drilled] = []
    scaled = None
    with running(settings, own_networks) as fleet:
        url = f"http://127.0.0.1:{port}"
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        asking = Clients(url, questions_of([model["task"] for model in listed if model.get("task")]))
        asking.learn()
        for name in chosen:
            if name in DRILLS:
                done.append(drill(name, fleet, asking, clients))
                console.print(done[-1])
        if "scaling" in chosen:
            scaled = scale(fleet, asking)
            console.print(scaled)
    rows = [
        [
            one.what,
            one.answered,
            ", ".join(f"{count} x {why}" for why, count in one.unanswered.items()) or "none",
            one.wrong,
            round(one.disturbed_seconds, 1),
            "never" if one.whole_seconds is None else round(one.whole_seconds, 1),
            round(one.slowest_seconds, 1),
        ]
        for one in done
    ]
    columns = ["drill", "answered", "not answered", "wrong", "last one after, s", "whole after, s", "slowest answer, s"]
    measured = {"drills": [vars(one) for one in done], "scaling": vars(scaled) if scaled else None}
    networks = ", each in a network of its own" if own_networks else ""
    tell(f"{clients} clients, three nodes{networks}", columns, rows, measured, out)
    wrong = sum(one.wrong for one in done) + (scaled.wrong if scaled else 0)
    if wrong or any(one.whole_seconds is None for one in done):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
