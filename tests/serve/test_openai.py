"""The endpoint as the official `openai` client meets it."""

import asyncio

import openai
import pytest

pytestmark = pytest.mark.integration

QUESTION = "The man turned on the faucet. What happened as a RESULT? As a result, the water"
GREEDY = {"temperature": 0, "max_tokens": 8}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(fleet):
    with openai.OpenAI(base_url=f"{fleet[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_streamed_completion_is_the_whole_one_piece_by_piece(client):
    whole = client.completions.create(model="auto", prompt=QUESTION, logprobs=2, **GREEDY)
    chunks = list(client.completions.create(model="auto", prompt=QUESTION, logprobs=2, stream=True, **GREEDY))

    assert len(chunks) > 2
    assert len({chunk.id for chunk in chunks}) == 1
    pieces = [chunk.choices[0] for chunk in chunks]
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text != ""
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    told = [piece.logprobs for piece in pieces if piece.logprobs]
    expected = whole.choices[0].logprobs
    assert [token for logprobs in told for token in logprobs.tokens] == expected.tokens
    values = [value for logprobs in told for value in logprobs.token_logprobs]
    assert values == pytest.approx(expected.token_logprobs, abs=1e-4)
    assert [offset for logprobs in told for offset in logprobs.text_offset] == expected.text_offset
    assert all(len(top) in (2, 3) for top in expected.top_logprobs)
    assert chunks[0].composition["weights"] == pytest.approx(whole.composition["weights"])
    assert all(getattr(chunk, "composition", None) is None for chunk in chunks[1:])
    assert set(chunks[-1].timings) == set(whole.timings)
    assert chunks[-1].timings["retrieval_ms"] > 0
    assert all(chunk.usage is None for chunk in chunks)


def test_a_streamed_chat_has_roles_usage_and_several_answers(client):
    asked = {
        "model": "auto",
        "messages": MESSAGES,
        "temperature": 1.0,
        "seed": 3,
        "n": 3,
        "max_tokens": 6,
        "extra_body": {"composition": {"method": "cat", "weigher": "uniform", "k": 2, "top_k": 50, "neighbours": True}},
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    texts, ends, roles = [""] * 3, {}, []
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.delta.role:
            roles.append(choice.index)
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    assert roles == [0, 1, 2]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    composition = chunks[0].composition
    assert composition["weigher"] == "uniform"
    assert list(composition["weights"].values()) == [0.5, 0.5]
    assert len(composition["neighbours"]) == 50


def test_several_prompts_are_streamed_at_once_each_with_its_composition(client):
    prompts = [QUESTION, "a gorgeous and touching film"]
    asked = {"model": "auto", "prompt": prompts, "n": 2, "seed": 5, "temperature": 1.0, "max_tokens": 6, "echo": True}
    whole = client.completions.create(**asked)
    texts = [""] * 4
    compositions = {}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if getattr(choice, "composition", None):
                compositions[choice.index] = choice.composition

    assert texts == [choice.text for choice in whole.choices]
    assert all(text.startswith(prompts[index // 2]) for index, text in enumerate(texts))
    assert list(compositions) == [0, 1, 2, 3]
    for choice in whole.choices:
        assert compositions[choice.index]["weights"] == pytest.approx(choice.composition["weights"], abs=1e-6)
    assert compositions[0]["weights"] != compositions[2]["weights"]


def test_chat_logprobs_have_alternatives_and_stop_texts_are_left_out(client):
    def chat(**more):
        return client.chat.completions.create(
            model="base", messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, top_logprobs=20, **more
        )

    whole = chat().choices[0]
    stop = whole.message.content[3:8]
    stopped = chat(stop=[stop]).choices[0]
    streamed = [chunk.choices[0] for chunk in chat(stop=[stop], stream=True)]

    content = whole.logprobs.content
    assert "".join(token.token for token in content) == whole.message.content
    for token in content:
        assert len(token.top_logprobs) == 20
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob), "the likeliest was taken"
        assert bytes(token.bytes).decode() == token.token
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole.message.content.partition(stop)[0]
    assert "".join(choice.delta.content or "" for choice in streamed) == stopped.message.content
    said = [token.token for choice in streamed if choice.logprobs for token in choice.logprobs.content]
    assert said == [token.token for token in stopped.logprobs.content]


def test_a_seed_repeats_its_draws_and_another_does_not(client):
    def ask(seed):
        answer = client.completions.create(model="base", prompt=QUESTION, temperature=1.0, max_tokens=12, seed=seed)
        return answer.choices[0].text

    assert ask(1) == ask(1) != ask(2)


def test_token_ids_are_prompts_and_are_routed_too(client):
    ids = [504, 1206, 314, 253, 1123]
    by_ids = client.completions.create(model="auto", prompt=[ids, ids], **GREEDY)
    text = client.completions.create(model="base", prompt=ids, echo=True, max_tokens=0)
    by_text = client.completions.create(model="auto", prompt=text.choices[0].text, **GREEDY)

    assert by_ids.usage.prompt_tokens == 10
    assert by_ids.choices[0].text == by_ids.choices[1].text == by_text.choices[0].text
    assert by_ids.composition["weights"] == pytest.approx(by_text.composition["weights"])
    with pytest.raises(openai.BadRequestError, match="token id 999999"):
        client.completions.create(model="auto", prompt=[5, 999999])


def test_an_echo_tells_the_log_likelihood_of_the_prompt(client):
    prompt = "The capital of France is Paris"
    asked = {"model": "base", "logprobs": 1, "temperature": 0}
    echoed = client.completions.create(prompt=prompt, echo=True, max_tokens=3, **asked).choices[0]
    prompt_only = client.completions.create(prompt=prompt, echo=True, max_tokens=0, **asked).choices[0]
    continued = client.completions.create(prompt=prompt, max_tokens=3, **asked).choices[0]

    told = echoed.logprobs
    assert echoed.text == "".join(told.tokens) == prompt + continued.text
    assert told.token_logprobs[0] is told.top_logprobs[0] is None
    assert max(told.token_logprobs[1:]) <= 0
    count = len(prompt_only.logprobs.tokens)
    assert prompt_only.text == prompt == "".join(told.tokens[:count])
    assert told.token_logprobs[1:count] == pytest.approx(prompt_only.logprobs.token_logprobs[1:], abs=1e-4)
    assert told.token_logprobs[count:] == pytest.approx(continued.logprobs.token_logprobs, abs=1e-4)
    begins = [echoed.text[offset:] for offset in told.text_offset]
    assert all(text.startswith(token) for text, token in zip(begins, told.tokens, strict=True))
    # What the model finds likely, and what it does not: the sum is a log-likelihood, and no constant.
    other = client.completions.create(prompt="The capital of France is fish", echo=True, max_tokens=0, **asked).choices[0]
    assert other.logprobs.token_logprobs[-1] < prompt_only.logprobs.token_logprobs[-1]


def test_the_asynchronous_client_streams_too(fleet):
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{fleet[0]}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(model="base", messages=MESSAGES, stream=True, **GREEDY)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask())


def test_errors_are_the_clients_exceptions_also_where_a_stream_was_asked_for(client):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match="sst2"):
            client.completions.create(model="ssst2", prompt=QUESTION, stream=stream)
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(model="base", prompt="x", max_tokens=65, stream=stream)
        assert wrong.value.param == "max_tokens"
        with pytest.raises(openai.BadRequestError, match="1024 answers") as never:
            client.completions.create(model="base", prompt=["x"] * 64, n=16, max_tokens=64, stream=stream)
        assert never.value.param == "n"
        many = {"model": "base", "prompt": ["x"] * 64, "n": 4, "max_tokens": 64}
        with client.completions.create(**many, stream=True), pytest.raises(openai.RateLimitError) as full:
            client.completions.create(**many, stream=stream)
        assert int(full.value.response.headers["Retry-After"]) >= 1
        assert full.value.code == "overloaded"


def test_a_model_is_retrieved_by_its_name_and_by_its_task(client):
    by_task = client.models.retrieve("copa")
    assert client.models.retrieve(by_task.id) == by_task
    assert client.models.retrieve("auto").id == "auto"
    with pytest.raises(openai.NotFoundError, match="copa"):
        client.models.retrieve("coppa")
