"""Submits, lists, follows and stops searches as jobs of a Ray cluster, through Ray's job API.

A job carries the search file, the folders of its tasks, and the files of the user's own scores. It does not carry
models: a zoo or Hugging Face name means the same everywhere, and a folder must lie at the same path on every node. On
the cluster, the tasks are copied into the run directory under a name made from their content. So a search whose tasks
have changed counts as another search.

Besides `workers.ray_pool`, this is the only module that imports ray.
"""

import asyncio
import hashlib
import ipaddress
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from evomerge.config.search import SearchConfig
from evomerge.errors import EvomergeError, InputError, WorkFailed, choices, first_line
from evomerge.evaluation.own_files import kept, read_own
from evomerge.evaluation.tasks import data_files
from evomerge.files import OWN, SEARCH_FILE, TASKS
from evomerge.workers.ray_address import TOKEN_FILE, token_header

EXAMPLE = "http://127.0.0.1:8265"
_KEY = "evomerge"  # of a job's metadata, under which the run directory is kept
_PROBE = 5.0  # seconds; Ray itself tries for minutes
_STOP = 60  # seconds from SIGTERM to SIGKILL: a search may be killed at any time, but its workers take a while to end
_LIMIT = 100 * 2**20  # of what Ray takes with a job
_ENDED = ("succeeded", "stopped", "failed")
_LEFT_OUT = (".git*", ".rayignore", "__pycache__", "*.pyc")


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """A search on the cluster.

    id: the job's.
    state: one of Ray's states, in small letters.
    directory: the run directory on the cluster.
    started: when it started, in seconds since 1970; None where it has not.
    ended: when it ended, in seconds since 1970; None where it has not.
    """

    id: str
    state: str
    directory: str
    started: float | None
    ended: float | None


class Cluster:
    """The job API of a Ray head."""

    def __init__(self, address: str, ca: Path | None = None, insecure: bool = False) -> None:
        """Connects to the head.

        address: of its dashboard, as in `http://127.0.0.1:8265`.
        ca: a file or folder of certificates to trust; by default the usual ones.
        insecure: whether plain HTTP to other machines is allowed.
        Raises InputError, after seconds at most, where no Ray head answers or it does not let us in.
        """
        self.address = check_address(address, insecure)
        if ca is not None and not ca.exists():
            raise InputError(f"--ca {ca}: no such file or folder of certificates; check the path.")
        headers, verify = _own_headers(), str(ca) if ca is not None else True
        headers |= _check_ray(self.address, headers, verify)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # Ray prefers this to the address that it is given
        os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # or the data that git ignores would not be carried
        with self._asking():
            from ray.job_submission import JobSubmissionClient

            for handler in logging.getLogger("ray").handlers:
                handler.setLevel(logging.ERROR)
            self._client = JobSubmissionClient(self.address, headers=headers, verify=verify)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """A context that turns Ray's refusals into a WorkFailed of one sentence."""
        import requests

        try:
            yield
        except EvomergeError:
            raise
        except (OSError, RuntimeError, ValueError, requests.RequestException) as error:
            raise WorkFailed(f"{self.address}: the cluster did not do it ({first_line(error)}).") from None

    def submit(self, config: SearchConfig, name: str, directory: str, pip: Sequence[str] = ()) -> str:
        """The id of a new job, which runs a search in a directory of the cluster or resumes the search there.

        config: the search's.
        name: the search's, for the id.
        directory: the run directory on the cluster.
        pip: requirements to install for the job; where there are none, the job runs in the cluster's own environment.
        Raises InputError where a job is at work in the directory, or the search cannot be packed.
        """
        earlier = [job for job in self.jobs() if job.directory == directory]
        for job in earlier:
            if job.state not in _ENDED:
                raise InputError(
                    f"{directory}: job {job.id} is at work there; follow it with `evomerge logs {job.id} --follow`, or "
                    "choose another --output."
                )
        with tempfile.TemporaryDirectory(prefix="evomerge-") as folder:
            pack(config, directory, Path(folder))
            runtime: dict[str, Any] = {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP)}}
            if pip:
                runtime["pip"] = list(pip)
            with self._asking():
                return str(
                    self._client.submit_job(
                        entrypoint=entrypoint(directory),
                        submission_id=_submission_id(name, directory, earlier),
                        runtime_env=runtime,
                        metadata={_KEY: directory},
                    )
                )

    def jobs(self) -> list[ClusterJob]:
        """The searches among the cluster's jobs, the newest last."""
        with self._asking():
            searches = [job for job in self._client.list_jobs() if _KEY in (job.metadata or {})]
        return sorted(map(_job, searches), key=lambda job: job.started or 0)

    def job(self, job_id: str) -> ClusterJob:
        """The search with an id. Raises InputError where the cluster has none."""
        searches = {job.id: job for job in self.jobs()}
        if job_id not in searches:
            raise InputError(f"{self.address}: has no search {job_id}; {choices(job_id, searches)}.")
        return searches[job_id]

    def logs(self, job_id: str) -> str:
        """All that a job has printed so far. Raises InputError where the cluster has no such search."""
        self.job(job_id)
        with self._asking():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], object]) -> ClusterJob:
        """Writes what a job prints, as it comes. Returns the job once it has ended.

        job_id: the job's.
        write: is called with one or more lines at a time.
        Raises InputError where the cluster has no such search.
        """

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(job_id):
                write(lines)

        self.job(job_id)
        with self._asking(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries below Ray
            asyncio.run(tail())
        return self._ended(job_id, 10)

    def stop(self, job_id: str) -> ClusterJob:
        """Has a job end as by Ctrl-C. Returns the job once it has ended.

        Raises InputError where the cluster has no such search, and WorkFailed where the job does not end.
        """
        if self.job(job_id).state not in _ENDED:
            with self._asking():
                self._client.stop_job(job_id)
        return self._ended(job_id, _STOP + 30)

    def _ended(self, job_id: str, patience: float) -> ClusterJob:
        deadline = time.monotonic() + patience
        while (job := self.job(job_id)).state not in _ENDED:
            if time.monotonic() > deadline:
                raise WorkFailed(f"{job_id}: is still {job.state}; look again with `evomerge jobs`.")
            time.sleep(0.5)
        return job


def _job(details: Any) -> ClusterJob:
    started, ended = (moment / 1000 if moment else None for moment in (details.start_time, details.end_time))
    return ClusterJob(details.submission_id, details.status.value.lower(), details.metadata[_KEY], started, ended)


def _submission_id(name: str, directory: str, earlier: Sequence[ClusterJob]) -> str:
    """A new job's id: the search's name, a hash of the directory, and a number that no earlier job there has, since Ray
    accepts an id only once.

    earlier: the jobs that ran in the directory.
    """
    numbers = [int(job.id.rpartition("-")[2]) for job in earlier]
    place = hashlib.sha256(directory.encode()).hexdigest()[:6]
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', name)}-{place}-{max(numbers, default=0) + 1}"


def entrypoint(directory: str) -> str:
    """The shell command of a job that runs in a directory. It uses `exec`, so that a stop reaches the search itself."""
    where = shlex.quote(directory)
    missing = "evomerge: not on the PATH of the head node; install it on every node, or submit with --pip"
    return (
        f"command -v evomerge >/dev/null || {{ echo {shlex.quote(missing)}; exit 127; }}; "
        f"evomerge unpack {where} --version {version('evomerge')} && "
        f"exec evomerge run {SEARCH_FILE} --output {where} --resume"
    )


def pack(config: SearchConfig, directory: str, folder: Path) -> None:
    """Fills a folder with what a job carries: the search file, and its tasks and the user's own scores under a name
    made from their content.

    config: the search's.
    directory: the run directory on the cluster.
    folder: the folder to fill.
    Raises InputError where a job cannot carry the search.
    """
    if not directory.startswith(("/", "~/")):
        raise InputError(f"--output {directory}: give a path on the cluster that begins with / or ~/.")
    staged = folder / "staged"
    for index, path in enumerate(map(Path, config.tasks.paths)):
        if not path.exists():
            raise InputError(f"tasks.paths[{index}] is {path}, which does not exist here; a job carries its tasks.")
        origin = path if path.is_dir() else path.parent
        shutil.copytree(origin, staged / str(index), ignore=shutil.ignore_patterns(*_LEFT_OUT))
    _check_data_files(config)
    own = read_own(config)
    for name, held in kept(config, own, "")[1].items():
        (staged / OWN).mkdir(parents=True, exist_ok=True)
        (staged / OWN / name).write_bytes(held)
    content = _content_hash(staged)
    if staged.exists():
        (folder / TASKS).mkdir()
        staged.rename(folder / TASKS / content)
    there = PurePosixPath(directory) / TASKS / content
    paths = [
        str(there / str(index) / (path.name if path.is_file() else ""))
        for index, path in enumerate(map(Path, config.tasks.paths))
    ]
    tasks = config.tasks.model_copy(update={"paths": tuple(paths), "data_root": None})
    carried = kept(config, own, str(there / OWN))[0].model_copy(update={"tasks": tasks})
    (folder / SEARCH_FILE).write_text(carried.to_yaml(), encoding="utf-8")


def _check_data_files(config: SearchConfig) -> None:
    """Raises InputError for a task's data file outside the folders of tasks.paths, since a job would not carry it."""
    origins = [path if path.is_dir() else path.parent for path in map(Path, config.tasks.paths)]
    for file, task in data_files([metric.task for metric in config.reported], config.tasks).items():
        if not any(file.is_relative_to(origin) for origin in origins):
            raise InputError(
                f"data file {file} of task '{task}' lies outside the folders of tasks.paths, and a job carries only "
                "these; put it beside the task's YAML file."
            )


def _content_hash(folder: Path) -> str:
    """Twelve hexadecimal digits, made from the names and contents of a folder's files.

    Raises InputError where the folder is too large for a job.
    """
    digest = hashlib.sha256()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if size > _LIMIT:
        raise InputError(
            f"tasks.paths: their folders hold {size / 2**20:.0f} MiB, and a job carries {_LIMIT / 2**20:.0f} at most; "
            "keep only tasks and their data there."
        )
    for path in files:
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def unpack(packed: Path, directory: Path, wanted: str) -> None:
    """Copies a job's tasks into the run directory, each content once, and whole or not at all. Runs on the cluster.

    packed: the folder that the job carried.
    directory: the run directory.
    wanted: the version of evomerge that submitted the job.
    Raises InputError where the cluster has another version.
    """
    if wanted != version("evomerge"):
        raise InputError(
            f"the search was submitted by evomerge {wanted}, but this cluster has {version('evomerge')}; install one "
            f"version on both, or submit with --pip evomerge=={wanted}."
        )
    for source in (packed / TASKS).glob("*"):
        target = directory / TASKS / source.name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
        shutil.copytree(source, partial / source.name)
        (partial / source.name).rename(target)
        partial.rmdir()


def notes(config: SearchConfig) -> list[str]:
    """What a user should know about a search before it goes to a cluster, as sentences."""
    folders = {f"models.{name}": model for name, model in config.models.items()} | {"base": config.base}
    folders |= {f"align.{name}.folder": own.folder for name, own in config.align.items() if own.folder is not None}
    told = [
        f"{key} is the folder {path}, which is not carried along: every node of the cluster must have it there"
        for key, path in sorted(folders.items())
        if path.startswith("/")
    ]
    if config.workers.pool == "local":
        told.append("workers.pool is local, so one worker on the head node does everything; --set workers.pool=ray")
    if config.storage is not None and "${" in config.storage:
        told.append("storage names an environment variable, which is not carried along: set it on the head node")
    return told


def check_address(address: str, insecure: bool) -> str:
    """The address of a Ray dashboard, without a slash at its end.

    address: as the user gave it.
    insecure: whether plain HTTP to other machines is allowed.
    Raises InputError for an address that is not a dashboard's, and for plain HTTP that is not allowed, since anyone on
    the way could read the token and the search.
    """
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme == "ray":
        raise InputError(f"--address {address}: jobs go to the dashboard's port, such as http://{parts.hostname}:8265.")
    try:
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:
        fine = False
    if not fine or parts.username or parts.query or parts.fragment:
        raise InputError(f"--address {address}: give the address of a Ray dashboard, such as {EXAMPLE}.")
    if parts.scheme == "http" and not insecure and not _is_loopback(parts.hostname or ""):
        raise InputError(
            f"--address {address}: plain HTTP to another machine shows the token to everyone on the way; use https, a "
            "tunnel (ssh -L 8265:127.0.0.1:8265 HEAD), or --insecure on a network that you trust."
        )
    return parts.geturl().rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _own_headers() -> dict[str, str]:
    """The headers that a proxy before the cluster needs, from the variable that Ray's own commands read."""
    text = os.environ.get("RAY_JOB_HEADERS", "")
    try:
        headers = json.loads(text or "{}")
    except ValueError:
        headers = None
    if not isinstance(headers, dict):
        raise InputError('RAY_JOB_HEADERS: expected a JSON object, such as {"Proxy-Authorization": "..."}.')
    return {str(name): str(value) for name, value in headers.items()}


def _check_ray(address: str, headers: Mapping[str, str], verify: str | bool) -> dict[str, str]:
    """The header that lets us into the head at an address; empty where it needs none.

    A token is shown only to a head that asks for tokens. Raises InputError where the head does not let us in.
    """
    mode = _get(f"{address}/api/authentication_mode", headers, verify)
    login = token_header() if _says(mode, "authentication_mode") == "token" else {}
    if not login and _says(mode, "authentication_mode") == "token":
        raise InputError(
            f"--address {address}: the cluster asks for a token, and there is none here; put it into RAY_AUTH_TOKEN or "
            f"{TOKEN_FILE} (on the head: `ray get-auth-token`)."
        )
    reply = _get(f"{address}/api/version", {**headers, **login}, verify)
    if reply.status_code in (401, 403):
        reason = "refuses the token" if login else f"answers {reply.status_code}"
        raise InputError(
            f"--address {address}: the cluster {reason}; put the cluster's token into RAY_AUTH_TOKEN, and what a proxy "
            "wants into RAY_JOB_HEADERS."
        )
    if _says(reply, "ray_version") is None:
        raise InputError(
            f"--address {address}: something answers there, but it is no Ray dashboard (HTTP {reply.status_code} to "
            "/api/version); give the address that `ray start` printed for the dashboard."
        )
    return login


def _get(url: str, headers: Mapping[str, str], verify: str | bool) -> Any:
    """The reply to a GET request. Raises InputError where none comes in time."""
    import requests

    try:
        return requests.get(url, headers=headers, verify=verify, timeout=_PROBE, allow_redirects=False)
    except requests.exceptions.SSLError as error:
        reason, advice = first_line(error), "name the certificates to trust with --ca"
    except requests.RequestException as error:
        reason, advice = type(error).__name__, "check the address, and that the cluster is up"
    parts = urlsplit(url)
    raise InputError(f"--address {parts.scheme}://{parts.netloc}: no answer ({reason}); {advice}.")


def _says(reply: Any, key: str) -> str | None:
    """The value of a key in a JSON reply; None where the reply has no such key."""
    try:
        content = reply.json()
    except ValueError:
        return None
    return str(content[key]) if reply.status_code == 200 and isinstance(content, dict) and key in content else None
