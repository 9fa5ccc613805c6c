"""Checks in seconds what answers at a Ray address, where Ray itself would try for minutes. Finds Ray's token."""

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import InputError

TOKEN_FILE = "~/.ray/auth_token"
_PATIENCE = 5.0
_QUESTIONS = {False: "/ray.rpc.NodeInfoGcsService/GetClusterId", True: "/ray.rpc.RayletDriver/ClusterInfo"}
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's switch for "this machine is 127.0.0.1"


def given(address: str | None) -> str | None:
    """The address of the cluster to use: the one that a user gives, else that of the environment, which Ray itself sets
    for jobs; None to start a Ray here.

    address: as a user gives it.
    """
    return address or os.environ.get("RAY_ADDRESS")


def token_header() -> dict[str, str]:
    """The header that carries Ray's token; empty where there is no token. It is read where Ray itself looks for it."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        try:
            token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", TOKEN_FILE)).expanduser().read_text(encoding="utf-8")
        except OSError:
            return {}
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def reach(address: str) -> None:
    """Checks that a Ray head answers at an address, and sets the environment so that Ray can connect to it.

    It must be called before ray is imported.

    address: HOST:PORT or ray://HOST:PORT; other names, such as `auto`, are left to Ray.
    Raises OSError where no Ray head answers, and InputError where the head does not accept our token.
    """
    match = re.fullmatch(r"(ray://)?([^:/]+):(\d+)", address)
    if match is None or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    host, port = match[2], int(match[3])
    if host in ("127.0.0.1", "localhost") and not match[1]:
        host = _own_address()  # Ray connects to this address in place of loopback, unless LOOPBACK_ONLY is set
        if not _listens(host, port):
            socket.create_connection((match[2], port), timeout=_PATIENCE).close()
            os.environ |= LOOPBACK_ONLY
            host = match[2]
    socket.create_connection((host, port), timeout=_PATIENCE).close()
    _ask(f"{host}:{port}", address)


def _ask(target: str, address: str) -> None:
    """Asks a head whether it lets us in. It is asked first without a token, which is shown only to a head that wants
    one."""
    import grpc

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_PATIENCE)
        except grpc.FutureTimeoutError:
            raise OSError("something answers there, but it is not Ray") from None
        question = channel.unary_unary(_QUESTIONS[address.startswith("ray://")], _as_it_is, _as_it_is)
        if not _refused(question, {}):
            return
        login = token_header()
        if not login or _refused(question, login):
            has = "refuses the token that is here" if login else "asks for a token, and there is none here"
            raise InputError(
                f"{address}: the Ray cluster {has}; put its token into RAY_AUTH_TOKEN or {TOKEN_FILE} (on the head: "
                "`ray get-auth-token`)."
            )
        os.environ["RAY_AUTH_MODE"] = "token"


def _refused(question: Any, login: Mapping[str, str]) -> bool:
    """Whether the head refuses to answer without another token. Ray deals with any other answer, and with none."""
    import grpc

    try:
        question(b"", timeout=_PATIENCE, metadata=[(name.lower(), value) for name, value in login.items()])
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False


def _as_it_is(content: bytes) -> bytes:
    return content


def _own_address() -> str:
    """This machine's address as other machines see it. Nothing is sent to find it out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True
