"""The endpoint deployed once more, with other settings. What comes behind this file meets those."""

import pytest

from serve.deploy import deploy

pytestmark = [pytest.mark.integration, pytest.mark.drill]

QUESTION = "The man turned on the faucet. What happened as a RESULT? As a result, the water"


def test_deployed_again_it_has_its_new_settings(fleet, http):
    url, settings = fleet
    before = http.post("/v1/route", json={"input": QUESTION}).json()
    weighing = settings.weighing.model_copy(update={"weigher": "prototypes", "k": 2, "temperature": 1e9})
    changed = settings.model_copy(update={"weighing": weighing})
    assert deploy(changed) == url
    after = http.post("/v1/route", json={"input": QUESTION}).json()

    assert (before["weigher"], after["weigher"]) == ("joint", "prototypes")
    assert list(after["weights"].values()) == pytest.approx([0.5, 0.5])
    assert after["shares"] == pytest.approx(before["shares"], abs=1e-6)
