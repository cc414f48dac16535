"""Requests join, leave, wait and are cancelled while others are on their way, and nobody's answer changes."""

import random
import threading
import time
from concurrent.futures import CancelledError, wait

import pytest
from engine.conftest import holds_nothing
from engine.families import build, random_adapter
from engine.listening import PATIENCE, Gate, Listener

from lorafleet.composition import Composition
from lorafleet.engine import GenerationRequest, ScoreRequest
from lorafleet.errors import EngineFull, RequestError

WORDS = ["river", "stone", "light", "and", "the", "market", "seven", "walks", "under", "blue", "question", "of", "answer"]
NAMES = ("one", "two", "three")


def adapters():
    return [random_adapter(build("llama"), name, seed=number) for number, name in enumerate(NAMES)]


def some_requests(count, seed=0, longest_prompt=30, max_tokens=25):
    draws = random.Random(seed)
    return [
        GenerationRequest(
            " ".join(draws.choices(WORDS, k=draws.randint(1, longest_prompt))),
            Composition(
                draws.choice(["linear", "cat", "ties"]),
                {name: draws.uniform(-1, 1) for name in draws.sample(NAMES, draws.randint(0, 3))},
            ),
            max_tokens=draws.randint(1, max_tokens),
            temperature=draws.choice([0, 0.8]),
            seed=number,
        )
        for number in range(count)
    ]


def answered(engine, asked):
    return [engine.generate([request])[0].tokens for request in asked]


def wait_until(fulfilled):
    deadline = time.monotonic() + PATIENCE
    while not fulfilled():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def alone(make_engine):
    """An engine that has one request at a time."""
    return make_engine(adapters=adapters(), rows=1)


@pytest.mark.parametrize("prefill_tokens", [512, 20])
def test_requests_from_many_threads_are_answered_as_alone(make_engine, alone, prefill_tokens):
    engine = make_engine(adapters=adapters(), rows=3, prefill_tokens=prefill_tokens)
    asked = some_requests(32)
    found = {}

    def one_thread(mine):
        draws = random.Random(mine)
        for place in range(mine, len(asked), 4):
            time.sleep(draws.uniform(0, 0.03))
            found[place] = engine.submit(asked[place])

    threads = [threading.Thread(target=one_thread, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place].result(PATIENCE).tokens for place in range(len(asked))] == answered(alone, asked)
    assert (engine.running, engine.waiting) == (0, 0)


def test_a_prompt_in_pieces_is_answered_as_in_one(make_engine, alone):
    asked = some_requests(12, seed=1)
    in_pieces = make_engine(adapters=adapters(), rows=4, prefill_tokens=5)
    assert [answer.tokens for answer in in_pieces.generate(asked)] == answered(alone, asked)


def test_a_long_prompt_does_not_stop_the_rows_on_their_way(make_engine):
    engine = make_engine(rows=2, prefill_tokens=10)
    heard = []
    late = []

    def submit_long():
        late.append(engine.submit(GenerationRequest("x" * 99, max_tokens=2), lambda _: heard.append("long")))

    first = Listener(at=3, do=submit_long)

    def hear(piece):
        heard.append("short")
        first(piece)

    short = engine.submit(GenerationRequest("on its way", max_tokens=40), hear)
    assert len(short.result(PATIENCE).tokens) == 40
    assert len(late[0].result(PATIENCE).tokens) == 2
    # 100 tokens in 10 pieces, and with each of them, or but for the last, the row on its way gets a token.
    assert heard.index("long") - 3 in (9, 10)


def test_never_more_rows_than_allowed_and_who_leaves_makes_room(make_engine):
    engine = make_engine(rows=2)
    seen = []

    def look(_):
        seen.append(engine.running)

    futures = [
        engine.submit(GenerationRequest(word, max_tokens=tokens), look)
        for word, tokens in zip(WORDS, (30, 2, 5, 1, 9, 3), strict=False)
    ]
    assert [len(future.result(PATIENCE).tokens) for future in futures] == [30, 2, 5, 1, 9, 3]
    assert max(seen) == 2


def test_a_cancelled_row_gives_everything_back_at_the_next_step(make_engine, alone):
    one, two = adapters()[:2]
    engine = make_engine(adapters=(one, two), rows=2, pages=2)
    doomed = engine.submit(GenerationRequest("to be cancelled", Composition("cat", {"one": 1.0}), max_tokens=900))
    running, users = [], []

    def look(piece):
        if len(watching.pieces) >= 5:
            running.append(engine.running)
            users.append([resident.users for key, resident in engine.pool._resident.items() if key[0].adapter == "one"])
        watching(piece)

    watching = Listener(at=5, do=doomed.cancel)
    request = GenerationRequest("who watches", Composition("cat", {"two": 1.0}), max_tokens=8)
    assert engine.submit(request, look).result(PATIENCE).tokens == answered(alone, [request])[0]
    assert running == [1, 1, 1] and users == [[0], [0], [0]]
    assert holds_nothing(engine)
    with pytest.raises(CancelledError):
        doomed.result()


def test_a_request_is_cancelled_while_its_prompt_is_computed(make_engine):
    engine = make_engine(rows=2, prefill_tokens=5)
    running, late = [], []

    def look(piece):
        running.append(engine.running)
        watching(piece)
        if len(watching.pieces) == 6:
            late[0].cancel()

    watching = Listener(at=2, do=lambda: late.append(engine.submit(GenerationRequest("x" * 200))))
    engine.submit(GenerationRequest("who watches", max_tokens=10), look).result(PATIENCE)
    assert running == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]


def test_a_cancelled_request_that_waits_is_never_computed(make_engine, alone):
    engine = make_engine(adapters=adapters(), rows=1)
    first, second, third = some_requests(3, seed=2)
    gate, unheard = Gate(), Listener()
    futures = [engine.submit(first, gate)]
    gate.reached()
    futures += [engine.submit(second, unheard), engine.submit(third), engine.submit_score(ScoreRequest("a", ("b", "c")))]
    assert engine.waiting == 3
    assert futures[1].cancel() and futures[3].cancel()
    assert engine.waiting == 1
    gate.open()
    assert [futures[place].result(PATIENCE).tokens for place in (0, 2)] == answered(alone, [first, third])
    assert not unheard.pieces


def test_who_waits_for_a_cancelled_future_is_told(make_engine):
    engine = make_engine(rows=1)
    gate = Gate()
    futures = [engine.submit(GenerationRequest("a", max_tokens=500), gate), engine.submit(GenerationRequest("b"))]
    gate.reached()
    for future in futures:
        future.cancel()
    gate.open()
    assert wait(futures, timeout=PATIENCE).done == set(futures)
    wait_until(lambda: holds_nothing(engine))


def test_to_leave_a_stream_early_cancels_it(make_engine, alone, monkeypatch):
    engine = make_engine(rows=1)
    submit, futures = engine.submit, []

    def submit_and_keep(*arguments, **named):
        futures.append(submit(*arguments, **named))
        return futures[-1]

    monkeypatch.setattr(engine, "submit", submit_and_keep)
    request = GenerationRequest("a stream that nobody reads to its end", max_tokens=900)
    for place, piece in enumerate(engine.stream(request)):
        assert piece.choice is not None
        if place == 3:
            break
    assert futures[0].cancelled()
    wait_until(lambda: holds_nothing(engine))
    following = GenerationRequest("the next one", max_tokens=5)
    assert engine.generate([following])[0].tokens == answered(alone, [following])[0]


def test_a_listener_that_raises_cancels_its_own_request_alone(make_engine, alone):
    engine = make_engine(adapters=adapters(), rows=4)
    asked = some_requests(6, seed=3)

    def fail():
        raise RuntimeError("the listener has gone")

    bad = engine.submit(GenerationRequest("a bad listener", max_tokens=900), Listener(at=2, do=fail))
    futures = [engine.submit(request) for request in asked]
    assert [future.result(PATIENCE).tokens for future in futures] == answered(alone, asked)
    with pytest.raises(CancelledError):
        bad.result(PATIENCE)


def test_what_is_refused_of_many_cancels_the_others(make_engine):
    engine = make_engine(rows=1, longest=64)
    gate = Gate()
    blocking = engine.submit(GenerationRequest("a", max_tokens=5), gate)
    gate.reached()
    with pytest.raises(RequestError, match="max_tokens is 40, and the prompt has 61 tokens"):
        engine.generate([GenerationRequest("fits", max_tokens=40), GenerationRequest("x" * 60, max_tokens=40)])
    assert engine.waiting == 0
    gate.open()
    assert len(blocking.result(PATIENCE).tokens) == 5


def test_more_than_may_wait_are_refused_until_some_are_done(make_engine):
    engine = make_engine(rows=1, waiting=2)
    gate = Gate()
    request = GenerationRequest("a", max_tokens=3)
    futures = [engine.submit(request, gate)]
    gate.reached()
    futures += [engine.submit(request), engine.submit(request)]
    with pytest.raises(EngineFull, match="2 requests wait already"):
        engine.submit(request)
    with pytest.raises(EngineFull):
        engine.submit_score(ScoreRequest("a", ("b",)))
    futures.append(engine.submit(request, patient=True))
    futures.pop(1).cancel()
    assert engine.waiting == 2, "what is cancelled does not wait"
    gate.open()
    assert len({future.result(PATIENCE).tokens for future in futures}) == 1
    assert engine.submit(request).result(PATIENCE).tokens == futures[0].result().tokens


def test_where_nobody_may_wait_free_rows_are_given(make_engine):
    engine = make_engine(rows=2, waiting=0)
    gate = Gate()
    request = GenerationRequest("a", max_tokens=3)
    futures = [engine.submit(request, gate)]
    gate.reached()
    futures.append(engine.submit(request))
    with pytest.raises(EngineFull, match="0 requests wait already"):
        engine.submit(request)
    gate.open()
    assert all(len(future.result(PATIENCE).tokens) == 3 for future in futures)


def test_closing_fails_what_waits_and_what_is_on_its_way(make_engine):
    engine = make_engine(adapters=adapters(), rows=1)
    gate = Gate()
    using = Composition("linear", {"one": 0.5, "two": 0.5})
    futures = [engine.submit(GenerationRequest("a", using, max_tokens=900), gate)]
    gate.reached()
    futures += [engine.submit(GenerationRequest("b")), engine.submit_score(ScoreRequest("a", ("b",)))]
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.open()
    closing.join(PATIENCE)
    for future in futures:
        with pytest.raises(EngineFull, match="the engine was closed"):
            future.result(PATIENCE)
    assert holds_nothing(engine)
    with pytest.raises(EngineFull, match="the engine is closed"):
        engine.submit(GenerationRequest("c"))


def test_scores_are_computed_while_rows_are_on_their_way(make_engine, alone):
    engine = make_engine(adapters=adapters(), rows=3, prefill_tokens=40)
    asked = some_requests(8, seed=4)
    options = ("yes", "no", "y", "never, not even on Sundays", "yes, of course")
    to_score = [ScoreRequest(request.prompt, options, request.composition) for request in asked]
    rows, scores = [], []
    for request, scored in zip(asked, to_score, strict=True):
        rows.append(engine.submit(request))
        scores.append(engine.submit_score(scored))
    assert [answer.result(PATIENCE).tokens for answer in rows] == answered(alone, asked)
    for found, wanted in zip(scores, alone.score(to_score), strict=True):
        totals = [score.total for score in found.result(PATIENCE)]
        assert totals == pytest.approx([score.total for score in wanted], rel=1e-4)


def test_an_error_in_a_pass_fails_its_rows_and_no_later_ones(make_engine, alone):
    """A model that breaks in the middle: the engine lives on, and half a pass leaves nothing behind."""
    model = build("llama")
    engine = make_engine(model, adapters(), rows=2)
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    working, calls = layer.forward, []

    def breaks_once(x):
        calls.append(x.shape)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return working(x)

    layer.forward = breaks_once
    request = some_requests(1, seed=5)[0]
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate([GenerationRequest("breaks", max_tokens=20)])
    assert holds_nothing(engine)
    assert engine.generate([request])[0].tokens == answered(alone, [request])[0]


def test_a_fault_of_a_step_fails_its_requests_and_no_others(make_engine, monkeypatch):
    engine = make_engine(adapters=adapters(), rows=2)
    asked = some_requests(3)
    with monkeypatch.context() as broken:

        def begin():
            raise ZeroDivisionError("a step cannot begin")

        broken.setattr(engine._loop, "_begin", begin)
        futures = [engine.submit(request) for request in asked]
        for future in futures:
            with pytest.raises(ZeroDivisionError):
                future.result(timeout=PATIENCE)
    assert all(answer.tokens for answer in engine.generate(asked))


def test_the_queue_does_not_fill_up_with_cancelled_requests_while_the_rows_are_busy(make_engine):
    engine = make_engine(adapters=adapters(), rows=1, waiting=4)
    blocking = engine.submit(GenerationRequest("a", max_tokens=900))
    pruned = Composition("magnitude_prune", {"one": 0.6, "two": 0.4}, 0.5)
    for number in range(200):
        if number % 2:
            engine.submit(GenerationRequest("b" * 30, pruned, max_tokens=2)).cancel()
        else:
            engine.submit_score(ScoreRequest("b" * 30, ("c",), pruned)).cancel()
    loop = engine._loop
    wait_until(lambda: not (loop._waiting or loop._scoring or loop._preparing))
    assert not blocking.done() and engine.running == 1
    blocking.cancel()
