import re
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from lorafleet.fleet import Fleet
from lorafleet.retrieval import server

pytestmark = pytest.mark.integration

QUESTION = "The man turned on the faucet. What happened as a RESULT? As a result, the water"
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture
def ask(http):
    def ask(**body) -> dict:
        answer = http.post("/v1/completions", json={"prompt": QUESTION, **GREEDY, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    return ask


def test_the_openai_client_works_and_the_answer_says_what_was_composed(fleet):
    client = openai.OpenAI(base_url=f"{fleet[0]}/v1", api_key="none", max_retries=0)

    completion = client.completions.create(model="auto", prompt=QUESTION, **GREEDY)
    plain = client.completions.create(model="base", prompt=QUESTION, logprobs=1, **GREEDY)
    chat = client.chat.completions.create(
        model="auto",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        ],
        logprobs=True,
        max_completion_tokens=8,
        temperature=0,
        stop=["."],
        extra_body={"composition": {"method": "cat", "weigher": "nucleus", "p": 0.5, "top_k": 10}},
    )

    assert completion.object == "text_completion"
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    logprobs = plain.choices[0].logprobs
    assert "".join(logprobs.tokens) == plain.choices[0].text != ""
    assert max(logprobs.token_logprobs) <= 0
    assert (completion.composition["method"], completion.composition["weigher"]) == ("cat", "joint")
    assert sum(completion.composition["weights"].values()) == pytest.approx(1)
    assert set(completion.timings) == {"retrieval_ms", "weighing_ms", "queue_ms", "first_token_ms", "total_ms"}
    assert completion.timings["total_ms"] > completion.timings["first_token_ms"] > 0 < completion.timings["retrieval_ms"]
    assert chat.composition["method"] == "cat"
    assert next(iter(chat.composition["weights"])) == "copa"
    assert "." not in chat.choices[0].message.content
    content = chat.choices[0].logprobs.content
    assert "".join(token.token for token in content).startswith(chat.choices[0].message.content)
    # A conversation goes through the chat template: system, user and assistant's turn are more tokens than the question.
    assert chat.usage.prompt_tokens > completion.usage.prompt_tokens

    listed = {model.id: model for model in client.models.list()}
    assert {"auto", "base"} < set(listed)
    assert {listed[name].task for name in set(listed) - {"auto", "base"}} == {"copa", "sst2", "wnli"}
    with pytest.raises(openai.NotFoundError, match="sst2"):
        client.completions.create(model="ssst2", prompt=QUESTION)


def test_route_says_neighbours_and_weights_and_generates_nothing(http):
    routed = http.post("/v1/route", json={"input": QUESTION, "top_k": 60, "weigher": "nucleus", "p": 0.4}).json()
    everything = http.post("/v1/route", json={"input": QUESTION, "top_k": 60, "weigher": "nucleus", "p": 1}).json()

    assert len(routed["neighbours"]) == 60
    similarities = [row["similarity"] for row in routed["neighbours"]]
    assert similarities == sorted(similarities, reverse=True)
    assert routed["neighbours"][0]["task"] == routed["nucleus"][0] == "copa"
    assert sum(routed["weights"].values()) == pytest.approx(1) == sum(routed["shares"].values())
    assert list(routed["weights"]) == routed["nucleus"]
    assert len(routed["nucleus"]) < len(everything["nucleus"])
    assert everything["weights"] == pytest.approx(everything["shares"])


def test_a_request_may_bring_its_own_weigher(http, ask):
    def route(**settings):
        return http.post("/v1/route", json={"input": QUESTION, "top_k": 60, "sharpness": 1, **settings}).json()

    shares = route(weigher="nucleus", p=1)["shares"]
    ((first, heavy), (second, light), *_) = shares.items()
    assert route(weigher="top_k", k=2)["weights"] == pytest.approx(
        {first: heavy / (heavy + light), second: light / (heavy + light)}
    )
    assert route(weigher="uniform", k=2, neighbours=False) | {"timings": None} == {
        "input": QUESTION,
        "weigher": "uniform",
        "weights": {first: 0.5, second: 0.5},
        "shares": pytest.approx(shares),
        "nucleus": [first, second],
        "neighbours": [],
        "timings": None,
    }
    softer = route(weigher="softmax", temperature=10.0)["weights"]
    assert max(softer.values()) - min(softer.values()) < 0.1 < heavy - light
    assert route(sharpness=8)["shares"][first] > heavy
    assert route(abstain_below=1)["weights"] == {}
    refused = http.post("/v1/route", json={"input": QUESTION, "weigher": "uniform", "p": 0.5})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "p")
    refused = http.post("/v1/route", json={"input": QUESTION, "weigher": "prototypes", "penalty": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "penalty")
    answer = ask(composition={"weigher": "top_k", "k": 1, "top_k": 60, "neighbours": True})["composition"]
    assert (answer["weigher"], answer["weights"]) == ("top_k", {first: 1.0})
    assert answer["neighbours"] == route()["neighbours"]
    assert ask(model="base")["composition"]["neighbours"] is None


@pytest.mark.parametrize(
    "wish",
    [{"weigher": "prototypes"}, {"weigher": "sparse_projection", "penalty": 0}, {"weigher": "routed"}, {"weigher": "joint"}],
)
def test_a_weigher_may_ask_where_the_query_lies(fleet, http, ask, wish):
    composition = ask(composition={**wish, "method": "cat", "k": 2, "top_k": 10})["composition"]
    assert composition["weigher"] == wish["weigher"]
    assert next(iter(composition["weights"])) == "copa"
    assert len(composition["weights"]) == 2
    assert sum(composition["weights"].values()) == pytest.approx(1)
    # In one process and over HTTP the same places are asked, in the file that the retriever has left.
    weighing = fleet[1].weighing.model_copy(update={**wish, "k": 2, "neighbours": 10})
    here = Fleet(fleet[1].model_copy(update={"weighing": weighing})).route(QUESTION)
    assert composition["weights"] == pytest.approx(dict(here), abs=1e-4)
    routed = http.post("/v1/route", json={"input": QUESTION, **wish, "k": 1, "top_k": 10}).json()
    assert (routed["weights"], len(routed["neighbours"])) == ({"copa": pytest.approx(1)}, 10)


def test_an_adapter_by_name_by_task_and_by_weight_one_are_the_same(ask, http):
    models = http.get("/v1/models").json()["data"]
    name = next(model["id"] for model in models if model["task"] == "wnli")
    by_name = ask(model=name)
    by_task = ask(model="wnli")
    explicit = ask(composition={"method": "linear", "weights": {name: 1}})
    base = ask(model="base")

    texts = {answer["choices"][0]["text"] for answer in (by_name, by_task, explicit)}
    assert len(texts) == 1
    assert base["choices"][0]["text"] not in texts
    assert by_name["composition"]["weights"] == explicit["composition"]["weights"] == {"wnli": 1}
    assert base["composition"]["weights"] == {}


def test_eight_prompts_with_eight_compositions_at_once_equal_each_alone(ask):
    wishes = [
        {"model": "base"},
        {"model": "copa"},
        {"model": "sst2", "composition": {"method": "cat"}},
        {"composition": {"method": "linear", "weights": {"copa": 0.6, "wnli": 0.4}}},
        {"composition": {"method": "cat", "weights": {"sst2": 0.3, "wnli": 0.7}}},
        {"composition": {"method": "magnitude_prune", "weights": {"copa": 0.5, "sst2": 0.5}, "density": 0.5}},
        {"composition": {"method": "ties", "weights": {"copa": 1, "sst2": 1, "wnli": 1}}},
        {"model": "auto"},
    ]
    requests = [{"prompt": f"{QUESTION} {'Think. ' * number}", **wish} for number, wish in enumerate(wishes)]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda request: ask(**request), requests))
    alone = [ask(**request) for request in requests]

    assert [answer["choices"][0]["text"] for answer in together] == [answer["choices"][0]["text"] for answer in alone]
    assert [answer["composition"] for answer in together] == [answer["composition"] for answer in alone]
    assert len({answer["choices"][0]["text"] for answer in together}) >= 4


def test_several_prompts_are_several_requests_with_n_choices_each(ask):
    prompts = [QUESTION, "a gorgeous and touching film"]
    answer = ask(prompt=prompts, n=2, temperature=1.0, seed=7, echo=True)
    again = ask(prompt=prompts, n=2, temperature=1.0, seed=7, echo=True)
    choices = answer["choices"]

    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    begins = [choice["text"].startswith(prompts[place // 2]) for place, choice in enumerate(choices)]
    assert begins == [True] * 4
    assert choices[0]["text"] != choices[1]["text"]
    assert [choice["text"] for choice in choices] == [choice["text"] for choice in again["choices"]]
    assert choices[0]["composition"] == choices[1]["composition"] == answer["composition"] != choices[2]["composition"]


def test_a_stop_that_is_a_special_token_ends_an_answer_where_the_token_comes(ask):
    """Drawn answers to a conversation that is over: some begin another turn."""
    turn, end = "<|im_start|>", "<|im_end|>"
    over = f"{turn}user\nHi{end}\n{turn}assistant\nHello!{end}\n"
    asked = {"model": "base", "prompt": over, "max_tokens": 24, "temperature": 1.0, "seed": 3, "n": 8, "logprobs": 0}
    free, stopped = ask(**asked)["choices"], ask(**asked, stop=[turn])["choices"]
    met = 0
    for whole, one in zip(free, stopped, strict=True):
        tokens = whole["logprobs"]["tokens"]
        if turn in tokens:
            met += 1
            assert one["finish_reason"] == "stop"
            assert one["logprobs"]["tokens"] == tokens[: tokens.index(turn)]
            assert whole["text"].startswith(one["text"])
        else:
            assert (one["text"], one["finish_reason"]) == (whole["text"], whole["finish_reason"])
    assert met


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"prompt": ""}, 400, "prompt", "at least 1"),
        ({}, 400, "prompt", "missing"),
        ({"prompt": ["a", 2]}, 400, "prompt.1", "2.*string"),
        ({"prompt": ["a"] * 65}, 400, "prompt", "64"),
        ({"prompt": "a", "max_tokens": 65}, 400, "max_tokens", "65.*at most 64"),
        ({"prompt": "a", "n": 17}, 400, "n", "17.*16"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "-1"),
        ({"prompt": "a", "stop": [""]}, 400, "stop", "empty"),
        ({"prompt": "a", "stop": ["b", "c", "d" * 1001]}, 400, "stop.2", "1001.*1000"),
        ({"prompt": "a", "stop": "d" * 1001}, 400, "stop", "1001.*1000"),
        ({"prompt": "a " * 100_000, "echo": True}, 400, "prompt", "more than 2048 tokens"),
        ({"prompt": [1, "a"]}, 400, "prompt.1", "integer"),
        ({"prompt": [[1], []]}, 400, "prompt.1", "at least 1"),
        ({"prompt": "a", "logprobs": 6}, 400, "logprobs", "6.*5"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "at least 1.*echo"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "stream is not true"),
        ({"prompt": "a", "stream": True, "echo": True, "logprobs": 1}, 400, "stream", "echo"),
        ({"prompt": "a", "frequency_penalty": 1}, 400, "frequency_penalty", "1"),
        ({"prompt": "a", "temprature": 1}, 400, "temprature", "temperature"),
        ({"prompt": "a", "composition": {"methd": "cat"}}, 400, "composition.methd", "methd"),
        ({"prompt": "a", "composition": {"method": "cta"}}, 400, "composition.method", "cta.*cat"),
        ({"prompt": "a", "composition": {"density": 0}}, 400, "composition.density", "0"),
        ({"prompt": "a", "composition": {"weights": {"copa": 1}, "p": 0.5}}, 400, "composition.p", "both"),
        ({"prompt": "a", "composition": {"weigher": "nucles"}}, 400, "composition.weigher", "nucles.*nucleus"),
        ({"prompt": "a", "composition": {"weigher": "softmax", "p": 0.5}}, 400, "composition.p", "softmax.*nucleus"),
        ({"prompt": "a", "composition": {"p": 0.5}}, 400, "composition.p", "joint has k.*nucleus"),
        ({"prompt": "a", "composition": {"temperature": 0}}, 400, "composition.temperature", "0"),
        ({"prompt": "a", "composition": {"weights": {"coppa": 1}}}, 404, "composition.weights.coppa", "copa"),
        ({"prompt": "a", "model": "copa", "composition": {"weights": {"copa": 1}}}, 400, "composition.weights", "copa"),
        ({"prompt": "a", "model": "bse"}, 404, "model", "base"),
        ({"prompt": "a" * 1_100_000}, 413, None, "larger"),
    ],
)
def test_a_bad_request_is_refused_with_the_field_named(http, body, status, param, says):
    answer = http.post("/v1/completions", json=body)

    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert re.search(says, error["message"])


def test_what_is_not_json_or_not_there_has_the_same_shape(http):
    broken = http.post("/v1/completions", content="{", headers={"Content-Type": "application/json"})
    elsewhere = http.get("/v1/nothing")
    neutral = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "user": "me", "presence_penalty": 0})

    assert (broken.status_code, elsewhere.status_code, neutral.status_code) == (400, 404, 200)
    assert "JSON" in broken.json()["error"]["message"]
    assert set(elsewhere.json()["error"]) == {"message", "type", "param", "code"}
    assert {"/v1/completions", "/v1/route"} <= set(http.get("/openapi.json").json()["paths"])


def test_without_an_index_the_endpoint_lives_and_says_503(fleet, http):
    _, settings = fleet
    server.stop(settings)
    try:
        unready = http.get("/readyz")
        answers = [
            http.post("/v1/completions", json={"prompt": QUESTION, **GREEDY}),
            http.post("/v1/route", json={"input": QUESTION}),
            http.post("/v1/completions", json={"prompt": QUESTION, **GREEDY, "composition": {"weigher": "prototypes"}}),
        ]
        explicit = http.post("/v1/completions", json={"prompt": QUESTION, "model": "base", "max_tokens": 1})
    finally:
        server.start(settings)

    assert http.get("/healthz").status_code == explicit.status_code == 200
    for answer in (unready, *answers):
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert re.fullmatch(r"[^\n]*Chroma at [^\n]*|no Chroma server[^\n]*", answer.json()["error"]["message"])
    assert http.post("/v1/route", json={"input": QUESTION}).status_code == 200
