"""The way to Chroma: waited for while it is away."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import chromadb
import chromadb.config
import httpx
from chromadb.api import ClientAPI
from chromadb.api.collection_configuration import CreateHNSWConfiguration
from chromadb.api.models.Collection import Collection
from chromadb.errors import ChromaAuthError, ChromaError, InternalError, NotFoundError, RateLimitError
from tenacity import RetryError, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from lorafleet.config import Index, Settings
from lorafleet.errors import IndexMismatch, IndexUnavailable
from lorafleet.network import bypass_proxies, takes_proxy
from lorafleet.retrieval import server

# Chroma's own client waits for an answer for ever; the longest honest one is the first query after a large write.
ANSWER_SECONDS = 120.0
LONGEST_PAUSE_SECONDS = 5.0
NAMES_AT_ONCE = 1000
Answer = TypeVar("Answer")


class Gone(IndexMismatch):
    """A version of the index was deleted while it was in use."""

    def __init__(self, what: str) -> None:
        super().__init__(f"a version of the index was deleted while it was in use: {what}", "Run: lorafleet embed")


class Refused(IndexUnavailable):
    """Chroma answered with an error that will not pass."""


class Connection:
    """Chroma, over HTTP or in a folder. Safe to use from several threads.

    Attributes:
        place: the server or folder, for people.
    """

    def __init__(self, client: ClientAPI, settings: Index, place: str) -> None:
        self.place = place
        self.settings = settings
        self._client = client

    def find(self, name: str) -> Collection | None:
        """The collection of that name; None where there is none."""

        def attempt() -> Collection | None:
            try:
                # No embedding function: rows and queries are embedded here, and Chroma's default would fetch a model.
                return self._client.get_collection(name, embedding_function=None)
            except NotFoundError:
                return None

        return self.patiently(attempt)

    def names(self, prefix: str) -> list[str]:
        """The names of the collections that begin so."""
        found: list[str] = []
        while True:
            seen = len(found)
            page = self.patiently(lambda seen=seen: self._client.list_collections(NAMES_AT_ONCE, seen))  # type: ignore[misc]
            found += [collection.name for collection in page]
            if len(page) < NAMES_AT_ONCE:
                return [name for name in found if name.startswith(prefix)]

    def create(self, name: str, metadata: Mapping[str, Any]) -> Collection:
        """A collection with the graph of the settings, or the one that is there.

        The vectors have length 1, so their inner product is the cosine; asked for cosines, Chroma would scale the vectors
        once more with every copy.
        """
        graph: CreateHNSWConfiguration = {
            "space": "ip",
            "ef_construction": self.settings.construction_breadth,
            "ef_search": self.settings.search_breadth,
            "max_neighbors": self.settings.links,
        }
        return self.patiently(
            lambda: self._client.get_or_create_collection(
                name, metadata=dict(metadata), configuration={"hnsw": graph}, embedding_function=None
            )
        )

    def delete(self, name: str) -> None:
        """Delete a collection with all its rows; nothing happens where there is none."""

        def attempt() -> None:
            try:
                self._client.delete_collection(name)
            except NotFoundError:
                return

        self.patiently(attempt)

    def patiently(self, action: Callable[[], Answer]) -> Answer:
        """Do something in Chroma; while it is away, again and again, up to `index.patience_seconds`.

        Raises:
            IndexUnavailable: it has not answered for so long, or refuses.
            Gone: the collection was deleted.
        """
        patience = self.settings.patience_seconds
        retrying = Retrying(
            stop=stop_after_delay(patience),
            wait=wait_random_exponential(multiplier=0.2, max=LONGEST_PAUSE_SECONDS),
            retry=retry_if_exception(_passing),
        )
        try:
            return retrying(action)
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise IndexUnavailable(
                f"Chroma at {self.place} has not answered for {patience:.0f} s ({_described(cause)})",
                "What was written is safe: bring the server back (here: lorafleet up) and run the same again",
            ) from None
        except NotFoundError as error:
            raise Gone(_described(error)) from None
        except ChromaError as error:
            raise Refused(f"Chroma at {self.place} refuses: {_described(error)}") from None


def connected(settings: Settings) -> Connection:
    """Over HTTP.

    Raises:
        IndexUnavailable: no server answers, or it refuses the connection.
    """
    url = settings.index.url
    if not server.answers(settings.index):
        raise _no_answer(url)
    if not takes_proxy(url):
        bypass_proxies(server.address(url)[0])
    try:
        client: Any = chromadb.HttpClient(url, headers=server.token_headers(settings.index), settings=_quiet())
    except (ValueError, ChromaAuthError, httpx.HTTPError) as error:
        raise IndexUnavailable(
            f"the Chroma server at index.url = {url} refuses the connection: {_described(error)}", "Check index.token"
        ) from None
    client._server._session.timeout = httpx.Timeout(ANSWER_SECONDS, connect=LONGEST_PAUSE_SECONDS)
    return Connection(client, settings.index, url)


def connected_for_reading(settings: Settings) -> Connection:
    """Over HTTP, or straight from its folder where no server of this machine runs.

    Raises:
        IndexUnavailable: no server answers, and there is no folder to open.
    """
    on_this_machine = server.on_this_machine(settings.index.url)
    if server.answers(settings.index) or not (on_this_machine and (settings.chroma / "chroma.sqlite3").is_file()):
        return connected(settings)
    if server.running(settings):
        raise _no_answer(settings.index.url)
    client = chromadb.PersistentClient(str(settings.chroma), settings=_quiet())
    return Connection(client, settings.index, str(settings.chroma))


def _quiet() -> chromadb.config.Settings:
    return chromadb.config.Settings(anonymized_telemetry=False)


def _no_answer(url: str) -> IndexUnavailable:
    mend = "lorafleet up" if server.on_this_machine(url) else "start it there, or set index.url"
    return IndexUnavailable(f"no Chroma server answers at index.url = {url}", f"Start one: {mend}")


def _passing(error: BaseException) -> bool:
    """Whether a fault may pass by itself: the server is away, restarts, or has too much to do."""
    if isinstance(error, (httpx.TransportError, InternalError, RateLimitError)):
        return True
    # What a proxy says for a server that is away, Chroma's client raises as a bare Exception with the page's text.
    answer = error.__context__
    return isinstance(answer, httpx.HTTPStatusError) and answer.response.status_code in (429, 502, 503, 504)


def _described(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
