"""API keys at rest: nothing in the file opens anything, and a damaged one is refused."""

import json
import stat

import pytest

from lorafleet.errors import KeyFileError
from lorafleet.keys import add_key, read_keys, remove_key, role_of


def test_a_key_opens_what_its_role_allows_and_the_file_does_not_hold_it(tmp_path):
    file = tmp_path / "state" / "keys.json"
    assert read_keys(file) == ()
    mine, other = add_key(file, "mine", "admin"), add_key(file, "other", "use")
    keys = read_keys(file)

    assert [role_of(key, keys) for key in (mine, other, mine[:-1], "", mine.upper(), keys[0].digest)] == [
        "admin",
        "use",
        *[None] * 4,
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert mine not in file.read_text() and mine[3:] not in file.read_text()
    # Of two equal keys one could not tell that they are equal.
    assert len({key.salt for key in keys}) == len({key.digest for key in keys}) == 2
    assert len(mine) >= 43 and mine != other

    assert [key.name for key in remove_key(file, "mine")] == ["other"]
    assert role_of(mine, read_keys(file)) is None


def test_names_are_unique_and_known(tmp_path):
    file = tmp_path / "keys.json"
    add_key(file, "ci", "use")
    before = file.read_bytes()
    with pytest.raises(KeyFileError, match=r"'ci'.*Choose another"):
        add_key(file, "ci", "admin")
    with pytest.raises(KeyFileError, match=r"'cd'.*Known: ci"):
        remove_key(file, "cd")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"role": "root"}, {"salt": "zz"}, {"salt": "abc", "digest": "d"}, {"digest": 7}, {"more": 1}, None]
)
def test_a_damaged_file_is_refused_whole(tmp_path, change):
    file = tmp_path / "keys.json"
    add_key(file, "ci", "use")
    data = json.loads(file.read_text())
    if change is None:
        file.write_text(file.read_text()[:-10])
    else:
        data["keys"][0].update(change)
        file.write_text(json.dumps(data))
    with pytest.raises(KeyFileError, match="cannot be read"):
        read_keys(file)
