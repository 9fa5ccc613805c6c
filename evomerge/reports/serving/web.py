"""A server that shows pages about runs to the person at this machine. The only module that imports aiohttp.

It listens on loopback alone and only reads. Whoever opens the address that it prints has a token, 256 random bits,
which a cookie keeps from then on. What a page may load is written in its headers: nothing from elsewhere. No part of an
address is ever a path: runs have numbers, and scripts stand in a table. The Host header must name this machine, so that
a page elsewhere whose name suddenly means 127.0.0.1 sees nothing (DNS rebinding).

aiohttp comes with ray[default], so it costs no further package.
"""

import asyncio
import hmac
import logging
import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any

from aiohttp import web

from evomerge.errors import InputError
from evomerge.reports.page.html import SCRIPTS
from evomerge.reports.serving.site import Shown, Site

LOOPBACK = "127.0.0.1"
_NAMES = (LOOPBACK, "localhost", "[::1]")
_PAGE = re.compile(r"/(runs/[0-9]{1,6})?")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data: blob:; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "evomerge",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def listening(port: int) -> socket.socket:
    """A socket that listens on loopback.

    port: the port, up to 65535; 0 for any that is free.
    Raises InputError where the port cannot be had.
    """
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise InputError(f"--port is {port}, which cannot be had ({error.strerror}); give another, or 0.") from None


def serve(site: Site, listener: socket.socket, token: str) -> None:
    """Shows a site until SIGINT or SIGTERM.

    site: the site.
    listener: where it is shown.
    token: what a reader must know.
    """
    made = application(site, token, f"evomerge-{port_of(listener)}")
    logging.getLogger("aiohttp.server").disabled = True  # it prints the address of a request that nobody can read
    web.run_app(made, sock=listener, print=None, access_log=None, shutdown_timeout=0.5)  # a log would keep the token


def port_of(listener: socket.socket) -> int:
    """The port on which a socket listens."""
    return int(listener.getsockname()[1])


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(32)


def application(site: Site, token: str, cookie: str) -> web.Application:
    """The server of a site.

    site: the site.
    token: what a reader must know.
    cookie: the name of the cookie that keeps the token; browsers share cookies between ports.
    """
    drawn = _Drawer()
    scripts = {name: Shown.of(make()) for name, make in SCRIPTS.items()}

    async def index(request: web.Request) -> web.Response:
        return _answer(request, await drawn(site.index), "text/html")

    async def run(request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        shown = await drawn(lambda: site.run(number))
        if shown is None:
            raise web.HTTPNotFound(text="There is no run of this number.")
        return _answer(request, shown, "text/html")

    async def script(request: web.Request) -> web.Response:
        found = scripts.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound(text="There is no such script.")
        answer = _answer(request, found, "text/javascript")
        answer.headers["Cache-Control"] = "private, no-cache"  # kept, but asked for by its tag
        return answer

    async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
        for name, value in _HEADERS.items():
            if name != "Cache-Control" or name not in response.headers:
                response.headers[name] = value

    made = web.Application(middlewares=[_guard(token, cookie)])
    made.on_response_prepare.append(add_headers)
    made.router.add_get("/", index)
    made.router.add_get(r"/runs/{number:[0-9]{1,6}}", run)
    made.router.add_get("/scripts/{name}", script)
    return made


def _guard(token: str, cookie: str) -> Any:
    """What lets only readers pass who know the token, and takes the token out of the address."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not is_here(request.headers.get("Host", "")):
            raise web.HTTPForbidden(text="The Host header names another machine.")
        if _same(request.query.get("token", ""), token):
            answer = web.HTTPSeeOther(request.path if _PAGE.fullmatch(request.path) else "/")
            answer.set_cookie(cookie, token, httponly=True, samesite="Strict")
            raise answer
        if not _same(request.cookies.get(cookie, ""), token):
            raise web.HTTPForbidden(text="Open the address with its token, as evomerge serve has printed it.")
        return await handler(request)

    return guard


def is_here(host: str) -> bool:
    """Whether a Host header names this machine, with whatever port: an SSH tunnel may have another.

    host: the header.
    """
    return re.sub(r":[0-9]+$", "", host).lower() in _NAMES


def _same(given: str, token: str) -> bool:
    """Whether two tokens are the same, in a time that does not tell how much of them is."""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _answer(request: web.Request, shown: Shown, kind: str) -> web.Response:
    """A page, or that the browser has it already."""
    headers = {"ETag": shown.tag}
    if request.headers.get("If-None-Match") == shown.tag:
        return web.Response(status=304, headers=headers)
    return web.Response(text=shown.text, content_type=kind, charset="utf-8", headers=headers)


class _Drawer:
    """One thread that draws pages, one after the other. It ends with the process, even in the middle of a page."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]] = SimpleQueue()
        Thread(target=self._work, daemon=True).start()

    async def __call__(self, draw: Callable[[], Any]) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._asked.put((draw, future))
        return await future

    def _work(self) -> None:
        while True:
            draw, future = self._asked.get()
            try:
                found, error = draw(), None
            except Exception as raised:
                found, error = None, raised
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, found, error)
            except RuntimeError:  # the server has ended meanwhile
                return


def _settle(future: "asyncio.Future[Any]", found: Any, error: Exception | None) -> None:
    if future.done():  # the reader has left
        return
    if error is None:
        future.set_result(found)
    else:
        future.set_exception(error)
