"""The file with Ray's token: whoever reads it runs any code as the user of the cluster."""

import os
import secrets
import stat
from pathlib import Path
from shlex import quote

from lorafleet.errors import LoRAFleetError
from lorafleet.home import expanded
from lorafleet.storage import file_in_one_step

OTHERS = 0o077
OTHERS_WRITE = 0o022


def auth_mode() -> str:
    """Ray's mode of authentication: by token, since it listens beyond loopback, unless RAY_AUTH_MODE says otherwise."""
    return os.environ.get("RAY_AUTH_MODE", "token").lower()


def token_file() -> Path | None:
    """The file in which Ray looks for the token; None where RAY_AUTH_TOKEN is the token itself.

    Raises:
        LoRAFleetError: this user has no home folder.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(named).absolute() if named else expanded("~/.ray/auth_token")
    except RuntimeError:
        raise LoRAFleetError(
            "this user has no home folder for Ray's token", "Set HOME, or name a file in RAY_AUTH_TOKEN_PATH"
        ) from None


def make_token() -> None:
    """Make a token where there is none, readable for its owner alone from its first byte: Ray's own follows the umask.

    Raises:
        LoRAFleetError: it cannot be written, or RAY_AUTH_TOKEN_PATH names a file that does not exist.
    """
    file = token_file()
    if file is None or os.path.lexists(file):
        return
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        raise LoRAFleetError(f"RAY_AUTH_TOKEN_PATH names {file}, which does not exist", "Write the cluster's token into it")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file_in_one_step(file, 0o600) as opened:
            opened.write(secrets.token_hex(32).encode())
    except OSError as error:
        raise LoRAFleetError(
            f"cannot write Ray's token to {file}: {error.strerror}", "Set HOME to a folder of this user"
        ) from None


def read_token() -> str:
    """The token; empty where there is none.

    Raises:
        LoRAFleetError: this user may not read it, or has no home folder.
    """
    file = token_file()
    if file is None:
        return os.environ["RAY_AUTH_TOKEN"]
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise LoRAFleetError(f"cannot read Ray's token in {file}: {error}") from None


def check_private() -> None:
    """Refuse a token that others can read, or can replace by their own.

    Raises:
        LoRAFleetError: they can; with the commands to run.
    """
    file = token_file()
    if file is None or not os.path.lexists(file):
        return
    try:
        commands = _closing(file)
    except OSError as error:
        raise LoRAFleetError(f"cannot look at Ray's token in {file}: {error.strerror}") from None
    if commands:
        raise LoRAFleetError(
            f"others can read or replace Ray's token in {file}, and so run commands as this user",
            f"Run: {' && '.join(commands)}. Where others may have read it, delete it: lorafleet up makes another",
        )


def _closing(file: Path) -> list[str]:
    """The commands that close a file and its folder to others."""
    folder, own = file.parent.stat(), file.stat()
    # A folder of Ray's alone holds nothing for others; one that RAY_AUTH_TOKEN_PATH names may hold other things.
    shut = OTHERS_WRITE if os.environ.get("RAY_AUTH_TOKEN_PATH") else OTHERS
    commands = []
    if own.st_uid not in (0, os.geteuid()):
        commands.append(f"chown {os.geteuid()} {quote(str(file))}")
    if stat.S_IMODE(folder.st_mode) & shut:
        commands.append(f"chmod {'go-w' if shut == OTHERS_WRITE else '700'} {quote(str(file.parent))}")
    if stat.S_IMODE(own.st_mode) & OTHERS:
        commands.append(f"chmod 600 {quote(str(file))}")
    return commands
