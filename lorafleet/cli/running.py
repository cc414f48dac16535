"""How a command ends: exit code 0 done, 1 failed, 2 bad usage; an error is one line, never a traceback."""

import os
import sys
from collections.abc import Callable

from lorafleet.errors import LoRAFleetError
from lorafleet.network import bypass_proxies


def run(command: Callable[[], object]) -> None:
    """Run a Typer command; `--debug` anywhere on its command line shows tracebacks.

    Raises:
        SystemExit: 1 after an error of ours, with one line on standard error; 130 after Ctrl-C.
    """
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Progress is ours to show: the libraries' bars would break it up.
    os.environ.setdefault("TQDM_DISABLE", "1")
    bypass_proxies()
    try:
        command()
    except LoRAFleetError as error:
        if debug:
            raise
        print(f"lorafleet: {_one_line(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        # Not caught where it happens, such as another user's folder among one's own.
        if debug or error.filename is None:
            raise
        print(f"lorafleet: {_one_line(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("lorafleet: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _one_line(text: str) -> str:
    """Escape line breaks, which a file name may have."""
    return "\\n".join(text.splitlines())
