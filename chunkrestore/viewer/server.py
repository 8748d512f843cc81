"""The server behind the page: on loopback alone, it reads and never writes.

Three things keep it to who started it. It listens on 127.0.0.1; the first part of every path is a secret of this run,
which other users of the machine do not know; and requests that come under another name than that of loopback are
refused, so that no web page reaches it by rebinding its own name (DNS rebinding). What answers may be read by other
origins is said once, in `chunkrestore.viewer.links.ORIGINS`, and holds for the files of the store alone.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from chunkrestore.viewer.links import ORIGINS, viewer_links
from chunkrestore.viewer.objects import read_object
from chunkrestore.viewer.raw import UnsatisfiableRangeError, open_raw, parse_range
from chunkrestore.viewer.scene import describe
from chunkrestore.viewer.slices import Tile, TileReader
from chunkrestore.viewer.sources import Source

_PAGE = {
    "": ("index.html", "text/html; charset=utf-8"),
    "viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
    "viewer.css": ("viewer.css", "text/css; charset=utf-8"),
}
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_TILE = re.compile(r"(\d{1,4})/(\d{1,2})/(xy|xz|yz)/(\d{1,8})/(\d{1,5})/(\d{1,10})/(\d{1,8})/(\d{1,8})")
_OBJECT = re.compile(r"(\d{1,4})/(\d{1,8})/(-?\d{1,20})")
_WORTH_PACKING = 2**12


class ViewServer(ThreadingHTTPServer):
    """Serves one scene on a port of 127.0.0.1.

    Parameters
    ----------
    sources
        What is looked at.
    store
        Folder or URL that was asked for. The files of a folder are served raw; those at a URL or in an archive are
        not.
    port
        Port to listen on; a free one by default.

    Raises
    ------
    OSError
        If the port is taken.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, sources: Iterable[Source], store: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.sources = tuple(sources)
        self.secret = secrets.token_urlsafe(12)
        self.root = store if os.path.isdir(store) else None
        self.tiles = TileReader([source.image for source in self.sources])
        self.links = [] if self.root is None else viewer_links(self.sources, f"{self.url}store", self.root)
        self.scene = json.dumps(describe(self.sources, self.links)).encode()

    @property
    def url(self) -> str:
        """Where the page is, with a final slash."""
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent about browsers that go away; what goes wrong otherwise is answered to them."""


class _Handler(BaseHTTPRequestHandler):
    """Answers requests of one connection."""

    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version = "chunkrestore"
    sys_version = ""
    timeout = 120
    """Seconds that an idle connection is kept."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_OPTIONS(self) -> None:
        self._answer(self._preflight)

    def _refuse_method(self) -> None:
        self.close_connection = True
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, b"Only GET, HEAD and OPTIONS.", Allow="GET, HEAD, OPTIONS")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_CONNECT = do_TRACE = _refuse_method  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log: the terminal is the user's."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer an error in plain text that repeats nothing of the request."""
        self.close_connection = True
        self._send(HTTPStatus(code), HTTPStatus(code).phrase.encode())

    def _answer(self, respond: Callable[[str], None]) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body that nobody reads would be taken for the next request
        if not _is_loopback(self.headers.get_all("Host") or []):
            self.close_connection = True
            self._send(
                HTTPStatus.MISDIRECTED_REQUEST, b"This server answers to 127.0.0.1 and localhost only."
            )
            return
        _, _, path = urlsplit(self.path).path.partition("/")
        secret, slash, rest = path.partition("/")
        if not slash or not secrets.compare_digest(secret.encode(), self.server.secret.encode()):
            self._not_found()
            return
        try:
            respond(rest)
        except (LookupError, FileNotFoundError):
            self._not_found()
        except (BrokenPipeError, ConnectionError, TimeoutError):
            self.close_connection = True
        except (ValueError, OSError) as error:
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)[:1000].encode())
        except Exception as error:
            # Whatever a library makes of a damaged store: the page tells it, and everything else goes on.
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}"[:1000].encode())

    def _get(self, path: str) -> None:
        kind, _, rest = path.partition("/")
        if path in _PAGE:
            name, content_type = _PAGE[path]
            content = files("chunkrestore.viewer").joinpath("page", name).read_bytes()
            self._send(HTTPStatus.OK, content, **{"Content-Type": content_type})
        elif path == "scene.json":
            self._send(HTTPStatus.OK, self.server.scene, **{"Content-Type": "application/json"})
        elif kind == "tile" and (found := _TILE.fullmatch(rest)):
            self._send_tile(found)
        elif kind == "object" and (found := _OBJECT.fullmatch(rest)):
            self._send_object(*map(int, found.groups()))
        elif kind == "store" and self.server.root is not None:
            self._send_file(rest)
        else:
            self._not_found()

    def _send_tile(self, found: re.Match[str]) -> None:
        plane = found[3]
        source, level, t, c, n, v, u = (int(found[i]) for i in (1, 2, 4, 5, 6, 7, 8))
        content = self.server.tiles.read(Tile(source, level, plane, t, c, (n, v, u))).tobytes()
        headers = {"Content-Type": "application/octet-stream"}
        if len(content) >= _WORTH_PACKING and "gzip" in self.headers.get("Accept-Encoding", ""):
            content = gzip.compress(content, compresslevel=1, mtime=0)
            headers["Content-Encoding"] = "gzip"
        self._send(HTTPStatus.OK, content, **headers)

    def _send_object(self, source: int, t: int, label: int) -> None:
        image = self.server.sources[source].image
        row = read_object(image.path, label, t=min(t, image.n_t - 1))
        self._send(HTTPStatus.OK, json.dumps(row).encode(), **{"Content-Type": "application/json"})

    def _send_file(self, path: str) -> None:
        assert self.server.root is not None
        found = open_raw(self.server.root, path)
        if found is None:
            self._not_found(self._shared())
            return
        with found.file:
            headers = {**found.headers, **self._shared()}
            asked = self.headers.get("Range") if "If-Range" not in self.headers else None
            try:
                part = parse_range(asked, found.nbytes)
            except UnsatisfiableRangeError:
                headers["Content-Range"] = f"bytes */{found.nbytes}"
                self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", **headers)
                return
            start, stop = part or (0, found.nbytes)
            if part is not None:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.nbytes}"
            self._begin(HTTPStatus.OK if part is None else HTTPStatus.PARTIAL_CONTENT, stop - start, headers)
            if self.command == "HEAD":
                return
            n_sent = 0
            for piece in found.pieces(start, stop):
                self.wfile.write(piece)
                n_sent += len(piece)
            self.close_connection |= n_sent < stop - start  # it has become shorter: the client must notice

    def _preflight(self, path: str) -> None:
        """Answer a browser that asks whether a page of another origin may read the store."""
        shared = self._shared()
        if not path.startswith("store/") or "Access-Control-Allow-Origin" not in shared:
            self._send(HTTPStatus.FORBIDDEN, b"Other pages may not read this.")
            return
        allowed = {
            "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
            "Access-Control-Allow-Headers": "Range",
            "Access-Control-Max-Age": "600",
        }
        if self.headers.get("Access-Control-Request-Private-Network") == "true":
            allowed["Access-Control-Allow-Private-Network"] = "true"
        self._begin(HTTPStatus.NO_CONTENT, None, {**shared, **allowed})

    def _shared(self) -> dict[str, str]:
        """Return the headers that let the pages of `ORIGINS` read an answer, and them alone."""
        origin = self.headers.get("Origin")
        shared = {"Vary": "Origin"}
        if origin in ORIGINS:
            shared |= {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Expose-Headers": "Accept-Ranges, Content-Length, Content-Range, ETag",
                "Cross-Origin-Resource-Policy": "cross-origin",
            }
        return shared

    def _not_found(self, headers: Mapping[str, str] | None = None) -> None:
        self._send(HTTPStatus.NOT_FOUND, b"There is nothing here.", **(headers or {}))

    def _send(self, status: HTTPStatus, content: bytes, **headers: str) -> None:
        self._begin(status, len(content), {"Content-Type": "text/plain; charset=utf-8", **headers})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(self, status: HTTPStatus, nbytes: int | None, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        content = {"Cross-Origin-Resource-Policy": "same-origin", **_SECURITY, **headers}
        if nbytes is not None:
            content["Content-Length"] = str(nbytes)
        if self.close_connection:
            content["Connection"] = "close"
        for name, value in content.items():
            self.send_header(name, value)
        self.end_headers()


def _is_loopback(hosts: list[str]) -> bool:
    """Return whether a request names loopback as its host; the port differs behind a tunnel."""
    return len(hosts) == 1 and re.sub(r":\d{1,5}$", "", hosts[0].lower()) in _HOSTS
