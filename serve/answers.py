"""What an answer over HTTP says beside the text: composition, tokens, time."""

import time
from collections.abc import Sequence

from serve.messages import Completed, Continuation
from serve.protocol import AppliedComposition, ChatLogprobs, CompletionLogprobs, Timings, TokenLogprob, Usage


def applied(completed: Completed) -> AppliedComposition:
    """What was composed, as an answer says it."""
    composition = completed.composition
    return AppliedComposition(method=composition.method, weights=dict(composition.weights), density=composition.density)


def usage(completed: Sequence[Completed]) -> Usage:
    """The tokens of all prompts and answers."""
    generations = [[continuation.generation for continuation in answer.continuations] for answer in completed]
    prompt = sum(answers[0].prompt_tokens for answers in generations)
    completion = sum(len(generation.tokens) for answers in generations for generation in answers)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def timings(completed: Sequence[Completed], start: float) -> Timings:
    """Where the time went: of several prompts the longest of each."""
    return Timings(
        retrieval_ms=round(max(answer.retrieval_ms for answer in completed), 3),
        weighing_ms=round(max(answer.weighing_ms for answer in completed), 3),
        queue_ms=round(max(answer.queue_ms for answer in completed), 3),
        first_token_ms=round(max(answer.first_token_ms for answer in completed), 3),
        total_ms=milliseconds_since(start),
    )


def milliseconds_since(start: float) -> float:
    """The time since `start`, a value of `time.perf_counter`."""
    return round(1000 * (time.perf_counter() - start), 3)


def completion_logprobs(continuation: Continuation, top: int) -> CompletionLogprobs:
    """The tokens of a completion; `top` is 0 or 1."""
    tokens = continuation.tokens
    offsets = [sum(len(token.text) for token in tokens[:place]) for place in range(len(tokens))]
    return CompletionLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.log_probability for token in tokens],
        text_offset=offsets,
        top_logprobs=[{token.text: token.log_probability} for token in tokens] if top else None,
    )


def chat_logprobs(continuation: Continuation) -> ChatLogprobs:
    """The tokens of a chat answer."""
    return ChatLogprobs(
        content=[
            TokenLogprob(token=token.text, logprob=token.log_probability, bytes=list(token.text.encode()))
            for token in continuation.tokens
        ]
    )
