"""The page at `/`: plain files beside this module, without a build step, and nothing from another host."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Scripts and styles of this origin alone, requests to it alone, no frames around it, and nothing that is written inline.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    # A browser asks again every time, and is answered 304 while nothing has changed.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, and the tag by which a browser knows whether it has changed."""

    content: bytes
    media_type: str
    tag: str


def read_files(folder: Path) -> Mapping[str, PageFile]:
    """The files of the page by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in MEDIA_TYPES:
            content = path.read_bytes()
            found[path.name] = PageFile(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    return found


FILES = read_files(FOLDER)
router = APIRouter(include_in_schema=False)


@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _answer(INDEX, request)


@router.get("/page/{name}")
async def file(name: str, request: Request) -> Response:
    """A style, a script or a picture of the page."""
    if name not in FILES:
        raise HTTPException(404, "the page has no such file")
    return _answer(name, request)


def _answer(name: str, request: Request) -> Response:
    found = FILES[name]
    headers = {**HEADERS, "ETag": found.tag}
    if found.tag in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
