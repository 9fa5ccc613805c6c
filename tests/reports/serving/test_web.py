"""The server answers only who knows the token and asks this machine by its name, and only with pages and scripts."""

import asyncio
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPCookieProcessor, build_opener

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from evomerge.reports.serving import web
from evomerge.reports.serving.site import Shown, Site
from tests.bad_input import Refuses
from tests.commands import start

TOKEN = web.new_token()
QUERIES = ("", "?token=", "?token=wrong", f"?token={TOKEN[:-1]}", f"?token={TOKEN}x", "?token=é")
PATHS = ("/", "/runs/1", "/runs/7", "/scripts/page.js", "/scripts/none.js", "/search.yaml", "/favicon.ico")
Asked = Callable[["TestClient[Any, Any]"], Awaitable[Any]]


class Pages(Site):
    """A site of one run, whose pages are short."""

    def __init__(self) -> None:
        super().__init__([Path("run")], 1.0)

    def index(self) -> Shown:
        return Shown.of("all runs")

    def run(self, number: int) -> Shown | None:
        return Shown.of(f"run {number}") if number == 1 else None


def ask(what: Asked, site: Site | None = None) -> Any:
    """Asks the server of a site, which ends afterwards."""

    async def asked() -> Any:
        made = web.application(site or Pages(), TOKEN, "evomerge-1")
        async with TestClient(TestServer(made)) as client:
            return await what(client)

    return asyncio.run(asked())


async def enter(client: "TestClient[Any, Any]") -> ClientResponse:
    return await client.get("/", params={"token": TOKEN}, allow_redirects=False)


def raw(client: "TestClient[Any, Any]", path: str) -> URL:
    """An address as it stands: no part of its path is tidied up."""
    return URL(f"http://{client.host}:{client.port}{path}", encoded=True)


def test_the_token_opens_the_pages_and_leaves_the_address() -> None:
    async def look(client: Any) -> Any:
        entered = await enter(client)
        cookie = entered.cookies["evomerge-1"]
        index, run = await client.get("/"), await client.get("/runs/1")
        return entered.status, entered.headers["Location"], cookie, await index.text(), await run.text()

    status, location, cookie, index, run = ask(look)
    assert (status, location) == (303, "/")
    assert cookie["httponly"]
    assert cookie["samesite"] == "Strict"
    assert cookie["path"] == "/"
    assert (index, run) == ("all runs", "run 1")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "query",
    ["", "?token=", "?token=wrong", f"?token={TOKEN[:-1]}", f"?token={TOKEN}x", "?token=é"],
    ids=["none", "empty", "wrong", "cut", "longer", "no ASCII"],
)
def test_nothing_is_shown_without_the_token(path: str, query: str) -> None:
    async def look(client: Any) -> Any:
        answer = await client.get(path + query, cookies={"evomerge-2": TOKEN})
        wrong = await client.get(path + query, cookies={"evomerge-1": "wrong"})
        return answer.status, await answer.text(), wrong.status

    status, text, wrong = ask(look)
    assert (status, wrong) == (403, 403)
    assert "token" in text


@pytest.mark.parametrize("path", ["//elsewhere.example/", "/runs/1/../../etc", "/scripts/page.js", "/runs/x"])
def test_the_token_leads_nowhere_else(path: str) -> None:
    async def look(client: Any) -> Any:
        answer = await client.session.get(raw(client, f"{path}?token={TOKEN}"), allow_redirects=False)
        return answer.status, answer.headers.get("Location")

    assert ask(look) == (303, "/")


@pytest.mark.parametrize(
    "host", ["elsewhere.example", "127.0.0.1.elsewhere.example:80", "localhost.", "", "[::2]", "0"]
)
def test_a_name_that_only_leads_here_sees_nothing(host: str) -> None:
    async def look(client: Any) -> Any:
        await enter(client)
        answers = [await client.get(path, headers={"Host": host}) for path in (*PATHS, f"/?token={TOKEN}")]
        return {answer.status for answer in answers}

    assert ask(look) == {403}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "LOCALHOST:1", "[::1]:80"])
def test_the_names_of_this_machine_are_known_with_any_port(host: str) -> None:
    async def look(client: Any) -> Any:
        await enter(client)
        return (await client.get("/", headers={"Host": host})).status

    assert ask(look) == 200


def test_every_answer_forbids_what_a_page_does_not_need() -> None:
    async def look(client: Any) -> Any:
        outside = [await client.get(path) for path in PATHS]
        inside = [await enter(client), *[await client.get(path) for path in PATHS]]
        return [(answer.status, answer.headers) for answer in (*outside, *inside)]

    answers = ask(look)
    assert {status for status, _ in answers} == {200, 303, 403, 404}
    for _, headers in answers:
        policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert set(policy["img-src"].split()) == {"data:", "blob:"}
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] in ("no-store", "private, no-cache")
        assert "Python" not in headers["Server"]


@pytest.mark.parametrize(
    "path",
    [
        "/scripts/../../../../etc/passwd",
        "/scripts/..%2f..%2fhtml.py",
        "/scripts/%2e%2e/html.py",
        "/scripts/page.css",
        "/scripts/page.js%00",
        "/scripts/",
        "/runs/../search.yaml",
        "/runs/1/archive.db",
        "/runs/-1",
        "/runs/1e9",
        "/runs/99999999",
        "/runs/%31%2f..",
    ],
)
def test_no_address_reaches_a_file(path: str) -> None:
    async def look(client: Any) -> Any:
        await enter(client)
        answer = await client.session.get(raw(client, path), cookies={"evomerge-1": TOKEN})
        return answer.status, await answer.text()

    status, text = ask(look)
    assert status == 404
    assert "root:" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(method: str) -> None:
    async def look(client: Any) -> Any:
        await enter(client)
        return {(await client.request(method, path)).status for path in ("/", "/runs/1", "/scripts/page.js")}

    assert ask(look) == {405}


def test_a_page_that_has_not_changed_is_not_sent_again() -> None:
    async def look(client: Any) -> Any:
        await enter(client)
        first = await client.get("/runs/1")
        again = await client.get("/runs/1", headers={"If-None-Match": first.headers["ETag"]})
        other = await client.get("/", headers={"If-None-Match": first.headers["ETag"]})
        return first.status, again.status, await again.text(), other.status

    assert ask(look) == (200, 304, "", 200)


def test_a_page_that_fails_does_not_stop_the_server() -> None:
    class Broken(Pages):
        def run(self, number: int) -> Shown | None:
            raise RuntimeError("broken")

    async def look(client: Any) -> Any:
        await enter(client)
        failed, after = await client.get("/runs/1"), await client.get("/")
        return failed.status, "broken" in await failed.text(), after.status

    assert ask(look, Broken()) == (500, False, 200)


def test_a_real_page_loads_only_what_the_server_has(finished: Path) -> None:
    async def look(client: Any) -> Any:
        await enter(client)
        text = await (await client.get("/runs/1")).text()
        scripts = [part.split('"')[0] for part in text.split('<script src="')[1:]]
        answers = [await client.get(script) for script in scripts]
        return text, scripts, [(answer.status, answer.content_type) for answer in answers]

    text, scripts, answers = ask(look, Site([finished], 5.0))
    assert len(scripts) == 3
    assert set(answers) == {(200, "text/javascript")}
    assert "<script>" not in text
    assert "http-equiv" not in text


def test_tokens_are_long_and_never_the_same() -> None:
    made = {web.new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(len(token) >= 43 for token in made)


@pytest.mark.slow
def test_the_command_shows_runs_until_it_is_interrupted(finished: Path, tmp_path: Path) -> None:
    printed, errors = tmp_path / "out", tmp_path / "err"
    process = start(errors, "serve", finished, tmp_path / "later", "--port", 0, output=printed)
    try:
        address = printed_address(process, printed)
        assert address.startswith("http://127.0.0.1:")
        opened = build_opener(HTTPCookieProcessor(CookieJar()))
        shown = opened.open(address, timeout=120)
        assert "token" not in shown.url
        text = shown.read().decode()
        assert "finished" in text
        assert "no such run directory" in text
        with pytest.raises(HTTPError, match="403"):
            build_opener().open(shown.url, timeout=60)
        opened.open(f"{shown.url}runs/2", timeout=60).close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert errors.read_text() == ""
        assert "Traceback" not in printed.read_text()
    finally:
        process.kill()
        process.wait()


def printed_address(process: "subprocess.Popen[str]", printed: Path) -> str:
    """The address that a server has printed, once it listens."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        words = printed.read_text().split()
        if "Ctrl-C" in words:
            return next(word for word in words if word.startswith("http"))
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("the server did not say where it is")


def test_a_port_that_is_taken_is_refused(finished: Path, refuses: Refuses) -> None:
    with web.listening(0) as taken:
        refuses("serve", finished, "--port", web.port_of(taken), says=("--port", "give another"))


@pytest.mark.parametrize(("options", "says"), [(("--port", 70000), "--port"), (("--every", 0), "--every")])
def test_wrong_options_are_refused(options: tuple[Any, ...], says: str, finished: Path, refuses: Refuses) -> None:
    refuses("serve", finished, *options, says=(says,))
