"""API keys: made once, shown once, and kept as salted hashes in one file.

A key is 256 random bits, so that one pass of SHA-256 is enough: there is nothing to guess that a slow hash would guard.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, get_args

from lorafleet.errors import KeyFileError
from lorafleet.storage import read_json, write_json

Role = Literal["use", "admin"]
MARK = "lf-"
KEY_BYTES = 32
SALT_BYTES = 16


@dataclass(frozen=True)
class StoredKey:
    """A key as it is kept: who it is for, what it allows, and what it is recognised by.

    Attributes:
        role: `use` asks and looks, `admin` changes the pool as well.
        salt, digest: hexadecimal; the digest is SHA-256 keyed with the salt.
        created: ISO 8601, UTC.
    """

    name: str
    role: Role
    salt: str
    digest: str
    created: str

    def opens_with(self, key: str) -> bool:
        """Whether this is the key; takes the same time whatever is presented."""
        return hmac.compare_digest(self.digest, _digest(key, bytes.fromhex(self.salt)))


def read_keys(path: Path, required: bool = False) -> tuple[StoredKey, ...]:
    """The keys of a file; none where there is no file.

    Args:
        required: whether a missing file is an error.

    Raises:
        KeyFileError: it cannot be read, is no file of keys, or is required and missing.
    """
    try:
        data = read_json(path)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if data is None and required:
        raise KeyFileError(
            f"the key file {path} does not exist", "Restore it, or make a key: lorafleet keys add NAME --role admin"
        )
    if data is None:
        return ()
    rows = data.get("keys") if isinstance(data, Mapping) else None
    if not isinstance(rows, list):
        raise _damaged(path, "it holds no list of keys")
    return tuple(_read(row, path) for row in rows)


def add_key(path: Path, name: str, role: Role) -> str:
    """Make a key, and keep its hash.

    Returns:
        The key; it cannot be had again.

    Raises:
        KeyFileError: there is one of that name, or the file cannot be read or written.
    """
    keys = read_keys(path)
    if any(key.name == name for key in keys):
        raise KeyFileError(f"there is a key named {name!r} in {path}", "Choose another name, or remove that one first")
    key = MARK + base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).rstrip(b"=").decode()
    salt = secrets.token_bytes(SALT_BYTES)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _write(path, (*keys, StoredKey(name, role, salt.hex(), _digest(key, salt), now)))
    return key


def remove_key(path: Path, name: str) -> tuple[StoredKey, ...]:
    """Take a key out; those that are left.

    Raises:
        KeyFileError: there is none of that name, or the file cannot be read or written.
    """
    keys = read_keys(path)
    left = tuple(key for key in keys if key.name != name)
    if len(left) == len(keys):
        known = ", ".join(key.name for key in keys) or "none"
        raise KeyFileError(f"there is no key named {name!r} in {path}", f"Known: {known}")
    _write(path, left)
    return left


def role_of(key: str, keys: tuple[StoredKey, ...]) -> Role | None:
    """What a key allows; None for one that is not known. All are looked at, so that time tells nothing."""
    matches = [stored.role for stored in keys if stored.opens_with(key)]
    return matches[0] if matches else None


def _digest(key: str, salt: bytes) -> str:
    return hmac.digest(salt, key.encode(), hashlib.sha256).hex()


def _read(row: object, path: Path) -> StoredKey:
    if not isinstance(row, Mapping) or row.keys() != {field.name for field in fields(StoredKey)}:
        raise _damaged(path, "a key has missing or unknown fields")
    key = StoredKey(**row)
    if key.role not in get_args(Role):
        raise _damaged(path, f"the role of {key.name!r} is {key.role!r}")
    try:
        bytes.fromhex(key.salt), bytes.fromhex(key.digest)
    except (TypeError, ValueError):
        raise _damaged(path, f"salt or digest of {key.name!r} is not hexadecimal") from None
    return key


def _write(path: Path, keys: tuple[StoredKey, ...]) -> None:
    try:
        write_json(path, {"keys": [asdict(key) for key in keys]}, mode=0o600)
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from None


def _damaged(path: Path, why: str) -> KeyFileError:
    return KeyFileError(f"the keys in {path} cannot be read: {' '.join(why.split())}", "Mend the file, or make new keys")
