"""What answers at a Ray address, asked in seconds: Ray itself would try for minutes. And the token that it may want."""

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


def token_header() -> dict[str, str]:
    """Ray's token, from where Ray looks for it, as the header that carries it."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        try:
            token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", TOKEN_FILE)).expanduser().read_text(encoding="utf-8")
        except OSError:
            return {}
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def reach(address: str) -> None:
    """Makes ready for connecting to an address, before ray is imported. Raises OSError where no Ray head answers there,
    and InputError where it wants another token than ours.

    Names such as `auto` are left to Ray.
    """
    match = re.fullmatch(r"(ray://)?([^:/]+):(\d+)", address)
    if match is None or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    host, port = match[2], int(match[3])
    if host in ("127.0.0.1", "localhost") and not match[1]:
        host = _own_address()  # which Ray puts in the place of loopback, unless told that there is no other
        if not _listens(host, port):
            socket.create_connection((match[2], port), timeout=_PATIENCE).close()
            os.environ |= LOOPBACK_ONLY
            host = match[2]
    socket.create_connection((host, port), timeout=_PATIENCE).close()
    _ask(f"{host}:{port}", address)


def _ask(target: str, address: str) -> None:
    """Asks first without a token: it is shown only to a head that wants one."""
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
    """Whether the head wants another token for an answer. Any other answer, or none, is for Ray to deal with."""
    import grpc

    try:
        question(b"", timeout=_PATIENCE, metadata=[(name.lower(), value) for name, value in login.items()])
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False


def _as_it_is(content: bytes) -> bytes:
    return content


def _own_address() -> str:
    """This machine's address as others see it; nothing is sent to find it out."""
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
