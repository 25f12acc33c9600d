# SPDX-License-Identifier: Apache-2.0
"""The web server of `rlhf-fast label`: one page, and what it asks for as JSON.

    GET  /api/task?annotator=NAME     the annotator's next prompt
    POST /api/answer                  {"annotator", "place", "numbers": [...], "criteria": {name: [...]}}
    POST /api/skip, /api/undo         {"annotator", "place"}, {"annotator"}

Every answer of the server is the next task. Whatever lies under /api wants the header `Authorization: Bearer TOKEN`,
with the token of the address that was printed at the start: a port of this machine is open to all of its users and to
every page in their browsers. The token stands behind the # of the address, which browsers do not send.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlhf_fast.data.examples import Prompt, prompt_text
from rlhf_fast.errors import UserError

from .answer_file import BEST_RATING, AnswerFile

PAGE = {  # path -> file and type
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
}
HEADERS = {
    # Nothing but the page's own files is run or fetched, whatever a model writes.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LARGEST_BODY = 2**16  # bytes
LONGEST_NAME = 100  # characters


class LabelServer(ThreadingHTTPServer):
    """Serves one answer file to those who know the token."""

    daemon_threads = True

    def __init__(self, answer_file: AnswerFile, address: tuple[str, int], annotator: str = "") -> None:
        """Listen on `address` (host, port), of IPv4 or IPv6; port 0 takes any free one. OSError if it cannot."""
        self.address_family, *_, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        super().__init__(place, _Handler)  # type: ignore[arg-type]  # of IPv6 it has four parts
        self.answer_file, self.annotator = answer_file, annotator
        self.token = secrets.token_urlsafe(24)
        self.lock = Lock()  # one request at a time reads and writes the answers

    @property
    def address(self) -> str:
        """The page's address with the token."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/#token={self.token}"

    def task(self, annotator: str, place: int | None = None) -> dict[str, Any]:
        """What the page shows: the item at `place`, or the annotator's next one; without a name what is to be done."""
        file = self.answer_file
        two = all(len(item.completions) == 2 for item in file.items)
        task: dict[str, Any] = {
            "annotator": annotator or self.annotator,
            "total": len(file.items),
            "task": "rate" if file.rate else "choose" if two else "rank",
            "criteria": file.criteria,
            "best_rating": BEST_RATING,
        }
        if not annotator:
            return task
        place = file.next(annotator) if place is None else place
        agreement = file.agreement()
        task |= {
            "done": file.progress(annotator)[0],
            "place": place,
            "agreement": None if agreement is None else agreement._asdict(),
        }
        if place is not None:
            item, order = file.items[place], file.order(annotator, place)
            task |= {
                "task": "rate" if file.rate else "choose" if len(order) == 2 else "rank",
                "prompt": _messages(item.prompt),
                "completions": [item.texts[k].strip() for k in order],
                "ended": [item.ended[k] for k in order],
                "best": file.best(place),
            }
        return task


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a connection may be silent

    def do_GET(self) -> None:
        """The page's files, or a task."""
        url = urlsplit(self.path)
        if url.path in PAGE:
            name, kind = PAGE[url.path]
            self._send(HTTPStatus.OK, (files(__package__) / "label_page" / name).read_bytes(), f"{kind}; charset=utf-8")
        elif url.path == "/api/task":
            self._answer(lambda: self.server.task(_name(parse_qs(url.query).get("annotator", [""])[0])))
        else:
            self._error(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        """An answer, a skip or an undo."""
        actions = {"/api/answer": _answer, "/api/skip": _skip, "/api/undo": _undo}
        action = actions.get(self.path)
        if action is None:
            self.close_connection = True  # its body is not read
            return self._error(HTTPStatus.NOT_FOUND, "there is no such page")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            self.close_connection = True
            return self._error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too large")
        body = self.rfile.read(int(length))
        self._answer(lambda: action(self.server, json.loads(body)))

    def _answer(self, work: Callable[[], dict[str, Any]]) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), self.server.token.encode()):
            return self._error(HTTPStatus.UNAUTHORIZED, "open the address that rlhf-fast label printed when it started")
        try:
            with self.server.lock:
                result = work()
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            return self._error(HTTPStatus.BAD_REQUEST, f"{type(error).__name__}: {error}")
        except UserError as error:  # the file of answers cannot be read or opened
            return self._error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except OSError as error:  # a full disk, say
            return self._error(HTTPStatus.INTERNAL_SERVER_ERROR, f"the answer could not be written: {error.strerror}")
        self._json(HTTPStatus.OK, result)

    def _error(self, status: HTTPStatus, message: str) -> None:
        self._json(status, {"error": message})

    def _json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """Not Python's version, which is nobody's business."""
        return "rlhf-fast"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: a request's path is an annotator's name."""


def _answer(server: LabelServer, body: dict[str, Any]) -> dict[str, Any]:
    name, place = _required(body), _place(server, body)
    server.answer_file.answer(name, place, list(body["numbers"]), dict(body.get("criteria") or {}))
    return server.task(name)


def _skip(server: LabelServer, body: dict[str, Any]) -> dict[str, Any]:
    name = _required(body)
    server.answer_file.skip(name, _place(server, body))
    return server.task(name)


def _undo(server: LabelServer, body: dict[str, Any]) -> dict[str, Any]:
    name = _required(body)
    place = server.answer_file.undo(name)
    return {**server.task(name, place), "undone": place is not None}


def _place(server: LabelServer, body: dict[str, Any]) -> int:
    place = body["place"]
    if type(place) is not int or not 0 <= place < len(server.answer_file.items):
        raise ValueError(f"there is no prompt {place!r}")
    return place


def _required(body: dict[str, Any]) -> str:
    name = _name(body["annotator"])
    if not name:
        raise ValueError("wanted the annotator's name")
    return name


def _name(value: Any) -> str:
    name = value.strip() if isinstance(value, str) else ""
    if len(name) > LONGEST_NAME or not (name.isprintable() or not name):
        raise ValueError(f"a name has at most {LONGEST_NAME} characters, and no control characters")
    return name


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    """The prompt as [{"role", "text"}]; text that is no chat has the role ""."""
    if isinstance(prompt, str):
        return [{"role": "", "text": prompt}]
    return [{"role": str(message["role"]), "text": prompt_text([message]).partition(": ")[2]} for message in prompt]
