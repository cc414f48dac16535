"""A part dies while it has a request in hand."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.drill]
IN_HAND_SECONDS = 2
PATIENCE = 60


def process(*words: str) -> psutil.Process:
    """The one process whose command line has all of these words."""
    (found,) = [
        one
        for one in psutil.process_iter(["cmdline"])
        if all(word in " ".join(one.info["cmdline"] or ()) for word in words) and one.pid != os.getpid()
    ]
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/route", {"input": "The film was dull."}),
        ("/v1/completions", {"prompt": "The film was dull.", "max_tokens": 2, "temperature": 0}),
        ("/v1/completions", {"prompt": "The film was dull.", "max_tokens": 2, "temperature": 0, "stream": True}),
    ],
    ids=["route", "whole", "streamed"],
)
def test_a_request_that_a_dying_retriever_has_in_hand_is_answered_by_the_next_one(fleet, http, path, body):
    chroma = process("chroma", "run", str(fleet[1].chroma))
    retriever = process("ServeReplica", "Retriever")
    # It has asked Chroma, which says nothing.
    chroma.suspend()
    try:
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(http.post, path, json=body, timeout=PATIENCE)
            time.sleep(IN_HAND_SECONDS)
            assert not asked.done()
            retriever.send_signal(signal.SIGKILL)
            chroma.resume()
            answer = asked.result(PATIENCE)
    finally:
        chroma.resume()
    assert answer.status_code == 200, answer.text
