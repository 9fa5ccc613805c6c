"""The command line: commands parse, call one function, and print. Heavy imports wait for the command that needs them.

Exit status: 0 done, 1 the work failed, 2 the input is wrong, 130 interrupted.
"""

import atexit
import gc
import json
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.errors import EvomergeError, InputError, WorkFailed

if TYPE_CHECKING:
    from evomerge.events import Event
    from evomerge.search.ablation import Ablation
    from evomerge.search.results import Results

app = typer.Typer(
    name="evomerge",
    help="Finds the recipe: evolutionary search over merges of language models.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SearchFile = Annotated[Path, typer.Argument(metavar="SEARCH.yaml", help="The search to run.", show_default=False)]
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.", show_default=False)]
Workers = Annotated[
    int | None, typer.Option(help="How many workers; 0 evaluates in this process. Does not change results.")
]
Address = Annotated[str | None, typer.Option(help="A Ray cluster to use (auto, HOST:PORT or ray://...).")]
Dashboard = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The dashboard of the cluster's head.")
]
Ca = Annotated[Path | None, typer.Option(help="Certificates to trust, a file or a folder.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Use plain HTTP to another machine.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job, as `evomerge jobs` lists it.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Changes one setting.")]
RunOrStorage = Annotated[
    str, typer.Argument(metavar="DIR", help="A run directory, or the URL of a shared storage.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and nothing else.")]

_SMALL = "smoke.yaml"
_DASHBOARD = "http://127.0.0.1:8265"


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"evomerge {version('evomerge')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Finds the recipe: evolutionary search over merges of language models."""


@app.command()
def run(
    search: SearchFile,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run directory [default: runs/NAME of the file].")
    ] = None,
    workers: Workers = None,
    address: Address = None,
    set_: Set = None,
    again: Annotated[
        bool, typer.Option("--resume", help="Go on where the directory holds this search already.")
    ] = False,
) -> None:
    """Run a search."""
    directory = (output or Path("runs") / search.stem).expanduser()
    _search(directory, [*(set_ or []), *_worker_settings(workers)], address, search, again)


@app.command()
def resume(directory: RunDirectory, workers: Workers = None, address: Address = None, set_: Set = None) -> None:
    """Go on with an interrupted search, or extend one (--set optimizer.evaluations=N)."""
    _search(directory, [*(set_ or []), *_worker_settings(workers)], address, None)


def _worker_settings(workers: int | None) -> list[str]:
    if workers is None:
        return []
    if workers < 0:
        raise InputError(f"--workers is {workers}; give the number of workers, or 0 to evaluate in this process.")
    return ["workers.pool=local"] if workers == 0 else ["workers.pool=ray", f"workers.count={workers}"]


def _search(
    directory: Path, overrides: Sequence[str], address: str | None, search: Path | None, again: bool = False
) -> None:
    from evomerge.reports import terminal
    from evomerge.runs import directory as runs
    from evomerge.search.results import all_failed, none_feasible

    output = terminal.console()
    view = terminal.SearchView(output)
    interruption = _Interruption()

    def listen(event: "Event") -> None:
        interruption.check()
        view(event)

    try:
        if search is not None:
            finished = runs.start(search, directory, overrides, address, listen, again)
        else:
            finished = runs.resume(directory, overrides, address, listen)
    except KeyboardInterrupt:
        view.close(interrupted=True)
        started = (directory / "search.yaml").exists()
        terminal.fail(
            f"interrupted; go on with `evomerge resume {directory}`."
            if started
            else "interrupted before the search began; nothing was written."
        )
        raise typer.Exit(130) from None
    finally:
        view.close()
    terminal.show_result(output, finished)
    failed = all_failed(finished.results)
    if failed is not None:
        raise WorkFailed(f"{failed}; see `evomerge candidates {directory}`.")
    best = finished.results.best()
    if best is None:
        terminal.fail(none_feasible(finished.results))
    else:
        only = " --evomerge-only" if best.candidate.recipe.evomerge.parallel else ""
        output.print(f"export the best with `evomerge export {directory}{only}`")


class _Interruption:
    """SIGINT and SIGTERM as KeyboardInterrupt. Remembered too, since one that is raised inside a library's callback can
    be swallowed there: `check`, called after every evaluation, raises it again."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._raise)

    def _raise(self, _signal: int, _frame: Any) -> None:
        self._asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt


@app.command()
def status(directory: RunOrStorage, as_json: AsJson = False) -> None:
    """Where a run stands, while it runs or after."""
    from dataclasses import replace

    from evomerge.reports import progress, terminal, views

    results, running = _read(directory)
    content = replace(views.status(results, running), evidence=views.evidence(results))
    if running:
        left = round(content.budget - content.equivalents) + content.controls.total - content.controls.done
        content = content.at(progress.pace(Path(directory), left))
    if as_json:
        return _print_json(views.as_json(content))
    return terminal.show_status(terminal.console(), content, results.config)


def _read(target: str) -> "tuple[Results, bool]":
    """What a run has found, given by its directory or by the URL of its storage, and whether it is running."""
    from evomerge.archive import shared
    from evomerge.runs import reading
    from evomerge.runs.lock import is_running
    from evomerge.search.results import Results

    if "://" in target or target.startswith("${"):
        archive, config, running = shared.open_shared(target)
        return Results(archive, config), running
    return reading.results(Path(target)), is_running(Path(target))


@app.command()
def front(directory: RunOrStorage, as_json: AsJson = False) -> None:
    """The Pareto front on all search items, with held-out scores where they are known."""
    from evomerge.reports import terminal, views

    results, _ = _read(directory)
    if as_json:
        return _print_json(views.as_json(views.front(results)))
    terminal.show_front(terminal.console(), results)
    return terminal.show_evidence(terminal.console(), views.evidence(results))


@app.command()
def candidates(directory: RunOrStorage, as_json: AsJson = False) -> None:
    """Every evaluation, in the order of the search."""
    from evomerge.reports import terminal, views

    results, _ = _read(directory)
    if as_json:
        return _print_json(views.as_json(views.candidates(results)))
    return terminal.show_candidates(terminal.console(), results)


@app.command()
def report(
    directory: RunDirectory,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("report.html"),
    items: Annotated[bool, typer.Option("--items", help="Add the text of the items that flipped.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Write it again and again while the search runs.")] = False,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="First score what is left of the winner without its parts.")
    ] = False,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Write a page about a run: one HTML file with figures, which opens without a network."""
    from evomerge.reports import terminal
    from evomerge.reports.page import writing

    writing.check_output(output)
    if ablate:
        _ablate(directory, workers, address, watch)
    elif workers is not None or address is not None:
        raise InputError("--workers and --address are for --ablate, since a page alone evaluates nothing.")
    if not watch:
        writing.write(directory, output, items)
        return terminal.console().print(f"{directory} shown in {output}; open it in a browser", markup=False)
    for story in writing.watch(directory, output, items):
        status = story.status
        terminal.console().print(f"{output} written: {status.state}, {status.evaluations} evaluations", markup=False)
    return None


@app.command()
def serve(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories.", show_default=False)],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where to listen on this machine; 0 for any port that is free.")
    ] = 8642,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="How often pages are renewed, at most.")] = 10.0,
    items: Annotated[bool, typer.Option("--items", help="Add the text of the items that flipped.")] = False,
) -> None:
    """Show runs side by side in a browser, live, until Ctrl-C. Only this machine can see it, with the token printed."""
    from evomerge.reports import terminal
    from evomerge.reports.serving import web
    from evomerge.reports.serving.site import Site

    if not 0 < every < math.inf:
        raise InputError(f"--every is {every:g}; give a number of seconds above 0.")
    listener, token = web.listening(port), web.new_token()
    shown = f"{len(directories)} run{'s' * (len(directories) != 1)}"
    terminal.console().print(
        f"{shown} shown at http://{web.LOOPBACK}:{web.port_of(listener)}/?token={token} until Ctrl-C", markup=False
    )
    web.serve(Site([directory.expanduser() for directory in directories], every, items), listener, token)


def _ablate(directory: Path, workers: int | None, address: str | None, watch: bool) -> None:
    from evomerge.events import Evaluated, Warned
    from evomerge.reports import terminal
    from evomerge.runs import directory as runs

    if watch:
        raise InputError("--ablate needs a search that has ended, and --watch follows one that runs; give one of them.")
    interruption = _Interruption()

    def listen(event: "Event") -> None:
        interruption.check()
        if isinstance(event, Warned):
            terminal.warn(event.message)
        elif isinstance(event, Evaluated) and event.evaluation.failed:
            terminal.fail(f"{event.candidate.id} failed: {event.evaluation.error}")

    def tell(planned: "Ablation", left: int) -> None:
        splits = " and ".join(terminal.TITLES[split] for split in planned.splits)
        terminal.console().print(
            f"{planned.winner.id} without its parts: {left} evaluations on {splits} items", markup=False
        )

    runs.ablate(directory, _worker_settings(workers), address, listen, tell)


@app.command()
def export(
    directory: RunDirectory,
    candidate: Annotated[str | None, typer.Option(help="Id of the candidate [default: the best].")] = None,
    prefer: Annotated[
        list[str] | None, typer.Option(metavar="OBJECTIVE=WEIGHT", help="Choose from the front by these weights.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="What to write [default: recipe.yaml, or adapter].")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Write the merge as a LoRA of this rank on the search's base instead.")
    ] = None,
    score: Annotated[bool, typer.Option("--score", help="Score the base with that LoRA on held-out items.")] = False,
    evomerge_only: Annotated[
        bool, typer.Option("--evomerge-only", help="Write layers side by side, too, which no checkpoint can hold.")
    ] = False,
) -> None:
    """Write a candidate's recipe, which mergekit reads too."""
    from evomerge.export import choice
    from evomerge.export import recipe as exports
    from evomerge.files import SEARCH_FILE, STATISTICS
    from evomerge.reports import terminal
    from evomerge.runs import directory as runs

    _only_with_rank(lora_rank, {"--score": score})
    opened = runs.read(directory)
    runs.check_sources(opened)
    record = choice.choose(opened.results, candidate, prefer or [])
    recipe = exports.shared_recipe(record, opened.results, opened.prepared.models, directory / STATISTICS)
    if lora_rank is not None:
        base = str(opened.prepared.models.base.folder)
        scored = directory / SEARCH_FILE if score else None
        _write_adapter(recipe, output or Path("adapter"), record.candidate.id, lora_rank, base, scored)
    else:
        output = output or Path("recipe.yaml")
        exports.write_recipe(recipe, output, evomerge_only)
        then = f"merge it with `evomerge merge {output} OUT_DIR`"
        if recipe.evomerge.parallel:
            then = f"score it with `evomerge evaluate {output} --config {directory / SEARCH_FILE}`"
        terminal.console().print(f"{record.candidate.id} written to {output}; {then}")
        if (lost := exports.lost_statistics(recipe, output, directory)) is not None:
            terminal.warn(lost)
    for warning in choice.warnings(record, opened.results):
        terminal.warn(warning)


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", show_default=False)],
    device: Annotated[str, typer.Option(help="Where to merge: cpu, cuda, mps, xpu.")] = "cpu",
    cuda: Annotated[bool, typer.Option("--cuda", help="The same as --device cuda.")] = False,
    max_shard_size: Annotated[
        str,
        typer.Option(
            "--max-shard-size",
            "--out-shard-size",
            help="Most of one file: bytes, as in 5GB, or numbers of parameters, as mergekit's 5B.",
        ),
    ] = "5GB",
    copy_tokenizer: Annotated[bool, typer.Option(help="Write a tokenizer too.")] = True,
    write_model_card: Annotated[bool, typer.Option(help="Write a README.md too.")] = True,
    statistics: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What `evomerge measure` wrote, for methods that need it.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Write a LoRA of this rank on the recipe's base instead.")
    ] = None,
    lora_base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that the LoRA changes, where the recipe has no base.")
    ] = None,
    score: Annotated[
        Path | None,
        typer.Option(metavar="SEARCH.yaml", help="Score the base with that LoRA on the held-out items of this search."),
    ] = None,
) -> None:
    """Write a recipe's merge as a plain Hugging Face checkpoint and check its fingerprint."""
    from evomerge.devices import resolve_device
    from evomerge.export import checkpoint
    from evomerge.merging.sources import located
    from evomerge.reports import terminal

    _only_with_rank(lora_rank, {"--lora-base": lora_base, "--score": score})
    where = resolve_device("cuda" if cuda else device, "--cuda" if cuda else "--device")
    loaded = located.load(recipe, terminal.warn)
    if lora_rank is not None:
        given = (lora_base, score, where, write_model_card, statistics)
        return _write_adapter(loaded, out, str(recipe), lora_rank, *given)
    fingerprint, checked = checkpoint.merge(
        loaded,
        out,
        str(recipe),
        where,
        shard_size=max_shard_size,
        tokenizer=copy_tokenizer,
        card=write_model_card,
        statistics=statistics,
        warn=terminal.warn,
    )
    verdict = "the one that was scored" if checked else "the recipe records none to compare"
    terminal.console().print(f"{out}: fingerprint {fingerprint} ({verdict})")
    return None


def _only_with_rank(rank: int | None, options: Mapping[str, Any]) -> None:
    """Raises InputError where an option is given that says something of a LoRA, and no LoRA is asked for."""
    given = next((name for name, value in options.items() if value), None)
    if rank is None and given is not None:
        raise InputError(f"{given} is about a LoRA; add --lora-rank R, or leave it out.")


def _write_adapter(
    recipe: Any,
    out: Path,
    where: str,
    rank: int,
    base: str | None,
    scored: Path | None,
    device: str = "cpu",
    card: bool = True,
    statistics: Path | None = None,
) -> None:
    """Writes a merge as an adapter, shows what it keeps, and scores it where a search file is given."""
    from evomerge.export import adapter
    from evomerge.reports import terminal
    from evomerge.search import scoring

    written = adapter.write_adapter(
        recipe, out, where, rank, device, base=base, card=card, statistics=statistics, warn=terminal.warn
    )
    terminal.show_adapter(terminal.console(), out, written)
    if scored is None:
        return
    target = f"{written.folder}+{out}"
    prepared, row = scoring.score(target, scored, "heldout", terminal.warn)
    terminal.show_scores(terminal.console(), "heldout items", [(target, row["scores"], row["mean"])], prepared)
    if row["error"]:
        terminal.fail(f"{target}: {row['error']}")
        raise typer.Exit(1)


@app.command()
def measure(
    search: SearchFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write into.")] = Path("statistics"),
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="fisher, grams, merged_grams, activations or row_weights [default: what the search's methods need].",
        ),
    ] = None,
    workers: Workers = None,
    address: Address = None,
    set_: Set = None,
) -> None:
    """Measure statistics of a search's models for methods that need them, such as fisher and regmean."""
    from evomerge.reports import terminal
    from evomerge.runs import statistics

    view = terminal.SearchView(terminal.console())
    overrides = [*(set_ or []), *_worker_settings(workers)]
    try:
        statistics.measure_file(search, output.expanduser(), kind, overrides, address, view)
    finally:
        view.close()


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A merged folder.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch, made where it is missing [default: main].")] = None,
    message: Annotated[str | None, typer.Option(help="The message of the commit.")] = None,
) -> None:
    """Upload a merged checkpoint with its card and recipe to the Hugging Face hub, private unless --public."""
    from evomerge.export import push as pushing
    from evomerge.reports import terminal

    pushing.check_name(repository)
    parcel = pushing.pack(checkpoint)
    output = terminal.console()
    output.print("\n".join(["uploading:", *pushing.listed(parcel.files, checkpoint)]), markup=False)
    if parcel.left:
        output.print(f"not part of the checkpoint, and not uploaded: {', '.join(parcel.left)}", markup=False)
    done = pushing.push(parcel, repository, public=public, revision=revision, message=message)
    output.print(f"{repository}: fingerprint {done.fingerprint} (that of the recipe), {done.url}", markup=False)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_RECIPE", show_default=False)],
    config: Annotated[Path, typer.Option(metavar="SEARCH.yaml", help="Says which tasks, items and device.")],
    split: Annotated[str, typer.Option(help="search, selection or heldout.")] = "search",
    as_json: AsJson = False,
) -> None:
    """Score a model or a recipe as a search would."""
    from evomerge.reports import terminal
    from evomerge.search import scoring

    prepared, row = scoring.score(target, config, split, terminal.warn)
    if as_json:
        _print_json(row)
    else:
        terminal.show_scores(terminal.console(), f"{split} items", [(target, row["scores"], row["mean"])], prepared)
    if row["left_out"]:
        terminal.fail(f"note: {row['left_out']} items are left out, since the search that made {target} saw them.")
    if row["truncated"]:
        terminal.warn(terminal.truncation(row["truncated"]))
    if row["error"]:
        terminal.fail(f"{target}: {row['error']}")
        raise typer.Exit(1)


@app.command()
def check(
    search: SearchFile,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's device, at most a minute, and forecast times.")
    ] = False,
    hourly: Annotated[
        float | None, typer.Option(min=0, help="With --measure: what an accelerator costs in an hour.")
    ] = None,
    address: Address = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Validate a search without running it: models, tasks, dimensions, memory, cost."""
    gc.set_threshold(50_000)  # libraries leave next to no garbage; to look for it took a fifth of the command's time
    from evomerge.reports import terminal
    from evomerge.search import preparation
    from evomerge.workers.ray_address import given

    if hourly is not None and not math.isfinite(hourly):
        raise InputError(f"--hourly is {hourly}; use a finite number.")
    if hourly is not None and not measure:
        raise InputError("--hourly needs seconds, which only --measure knows; add --measure.")
    prepared = preparation.prepare_file(search, set_ or [], given(address))
    plan = preparation.plan_of(prepared)
    summary = preparation.summarize(prepared, plan)
    if measure:
        from evomerge.doctor.forecast import forecast

        summary["forecast"] = forecast(prepared, plan.chosen, hourly).parts()
    if as_json:
        return _print_json(summary)
    placements, told = summary.pop("placements"), summary.pop("forecast", None)
    for warning in summary.pop("warnings"):
        terminal.warn(warning)
    terminal.show_summary(terminal.console(), summary)
    terminal.show_placements(terminal.console(), placements)
    if told is not None:
        terminal.show_forecast(terminal.console(), told)
    return None


@app.command()
def align(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that moves.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", show_default=False)],
    to: Annotated[str, typer.Option(metavar="MODEL", help="The model that stays, such as the base of a search.")],
    by: Annotated[str, typer.Option(help="What is compared: weights or activations.")] = "weights",
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="One text a line, for activations and the barrier. What follows a tab counts."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a model that was trained apart next to another one, by permutations that change nothing it says."""
    from dataclasses import asdict

    from evomerge.alignment import align as aligning
    from evomerge.reports import terminal

    found = aligning.align(model, to, out, by, aligning.read_texts(texts) if texts else ())
    doubt = found.doubt(model)
    if doubt is not None:
        terminal.warn(doubt)
    if as_json:
        return _print_json(asdict(found))
    return terminal.show_alignment(terminal.console(), out, found)


@app.command()
def diagnose(
    search: SearchFile,
    texts: Annotated[
        int, typer.Option(min=0, help="Let the models read so many search items of each task, to compare layers.")
    ] = 0,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Say what the models' weights mean for a merge: distances, cosines and conflicts, layer by layer."""
    from evomerge.diagnosis import diagnose as diagnosing
    from evomerge.reports import terminal
    from evomerge.search import preparation

    diagnosis = diagnosing.diagnose(preparation.prepare_file(search, set_ or []), texts)
    if as_json:
        return _print_json(diagnosis.as_json())
    return terminal.show_diagnosis(terminal.console(), diagnosis)


@app.command()
def doctor(
    search: Annotated[
        Path | None,
        typer.Argument(metavar="SEARCH.yaml", help="The search to try [default: smoke.yaml]", show_default=False),
    ] = None,
    address: Address = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Find out whether evomerge works on this machine or cluster: devices, memory, fingerprints, scores, a search."""
    from dataclasses import asdict

    from evomerge.doctor import examination
    from evomerge.reports import terminal
    from evomerge.zoo import shared

    findings = []
    for finding in examination.examine(search or shared("search_spaces") / _SMALL, tuple(set_ or ()), address):
        findings.append(finding)
        if not as_json:
            terminal.fail(f"{finding.check}, {finding.where}: {'as expected' if finding.good else 'NOT AS EXPECTED'}")
    healthy = bool(findings) and all(finding.good for finding in findings)
    if as_json:
        _print_json({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        terminal.show_findings(terminal.console(), findings)
    if not healthy:
        raise typer.Exit(1)


@app.command()
def convert(
    config: Annotated[
        Path, typer.Argument(metavar="FILE.yml", help="A mergekit-evolve config, or a recipe.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The search file to write [default: standard output].")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, where the file names none.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK[:METRIC[:FILTER]]", help="A task, for a recipe, which has none.")
    ] = None,
    max_fevals: Annotated[
        int | None, typer.Option(help="How many candidates [default: 100 as in mergekit-evolve].")
    ] = None,
    sigma: Annotated[float | None, typer.Option("--sigma", "--sigma0", help="The first step.")] = None,
    force_population_size: Annotated[int | None, typer.Option(help="Candidates in a generation.")] = None,
    strategy: Annotated[str | None, typer.Option("--strategy", "-s", help="pool, buffered or serial.")] = None,
    random_seed: Annotated[int | None, typer.Option(help="Of the search.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a batch.")] = None,
    task_search_path: Annotated[list[str] | None, typer.Option(metavar="FOLDER", help="Where tasks are found.")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="How many GPUs, with a worker on each.")] = None,
    timeout: Annotated[float | None, typer.Option(hidden=True)] = None,
    in_memory: Annotated[bool, typer.Option("--in-memory/--no-in-memory", hidden=True)] = False,
    vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", hidden=True)] = False,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", hidden=True)] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", hidden=True)] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code/--no-trust-remote-code", hidden=True)] = False,
    allow_crimes: Annotated[bool, typer.Option("--allow-crimes/--no-allow-crimes", hidden=True)] = False,
    storage_path: Annotated[str | None, typer.Option(hidden=True)] = None,
    merge_cuda: Annotated[bool | None, typer.Option("--merge-cuda/--no-merge-cuda", hidden=True)] = None,
    reshard: Annotated[bool | None, typer.Option("--reshard/--no-reshard", hidden=True)] = None,
    save_final_model: Annotated[
        bool | None, typer.Option("--save-final-model/--no-save-final-model", hidden=True)
    ] = None,
    wandb: Annotated[bool | None, typer.Option("--wandb/--no-wandb", hidden=True)] = None,
    wandb_project: Annotated[str | None, typer.Option(hidden=True)] = None,
    wandb_entity: Annotated[str | None, typer.Option(hidden=True)] = None,
    benchmarks: Annotated[
        bool, typer.Option("--i-understand-the-depths-of-the-evils-i-am-unleashing", hidden=True)
    ] = False,
) -> None:
    """Make a search file of a mergekit-evolve config, or of a recipe. Takes the options of mergekit-evolve too."""
    from evomerge.conversion import convert as conversion
    from evomerge.conversion.options import Options
    from evomerge.reports import terminal

    unneeded = {
        "--storage-path": storage_path,
        "--merge-cuda": merge_cuda,
        "--reshard": reshard,
        "--save-final-model": save_final_model,
        "--wandb": wandb,
        "--wandb-project": wandb_project,
        "--wandb-entity": wandb_entity,
        "--i-understand-the-depths-of-the-evils-i-am-unleashing": benchmarks or None,
    }
    options = Options(
        base=base,
        tasks=tuple(task or ()),
        max_fevals=max_fevals,
        sigma=sigma,
        population=force_population_size,
        strategy=strategy,
        seed=random_seed,
        batch_size=batch_size,
        task_paths=tuple(task_search_path or ()),
        num_gpus=num_gpus,
        timeout=timeout,
        in_memory=in_memory,
        vllm=vllm,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        trust_remote_code=trust_remote_code,
        allow_crimes=allow_crimes,
        unneeded=tuple(name for name, value in unneeded.items() if value is not None),
    )
    converted = conversion.convert(config, output.parent if output else Path(), options)
    if output is None:
        sys.stdout.write(converted.text)
    else:
        conversion.write_new(output, converted.text)
        terminal.console().print(
            f"{output} written; look at its comments, then `evomerge check {output}`", markup=False
        )
    for sentence in converted.lost:
        terminal.warn(f"not kept: {sentence}")


@app.command()
def init(
    base: Annotated[str, typer.Option(metavar="MODEL", help="The model that the others were tuned from.")],
    model: Annotated[list[str], typer.Option(metavar="NAME=MODEL", help="A model to merge; give the option for each.")],
    task: Annotated[
        list[str], typer.Option(metavar="TASK[:METRIC[:FILTER]]", help="What to improve; give the option for each.")
    ],
    task_path: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER", help="Where your own tasks are found.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="300|2h", help="How many candidates, or how long [default: 300].")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The search file to write.")] = Path("search.yaml"),
) -> None:
    """Write a search file for your models and tasks, with comments, that passes `check`."""
    from evomerge import starting
    from evomerge.conversion.convert import check_new, write_new
    from evomerge.reports import terminal

    amount = starting.parse_budget(budget)
    check_new(output)
    write_new(output, starting.search_file(base, model, task, task_path or [], amount, output.parent))
    terminal.console().print(
        f"{output} written; read its comments, then `evomerge check {output}` and `evomerge run {output}`", markup=False
    )


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where everything goes.")] = Path("runs/demo"),
    smoke: Annotated[bool, typer.Option("--smoke", help="A short search, in seconds.")] = False,
) -> None:
    """Search over the models that come with evomerge, show it as a page, export the best recipe and merge it."""
    import shutil

    from evomerge import starting

    _search(directory, [], None, starting.demo_file(smoke), again=True)
    report(directory, directory / "report.html")
    export(directory, output=directory / "recipe.yaml")
    shutil.rmtree(directory / "merged", ignore_errors=True)  # of an earlier time
    merge(directory / "recipe.yaml", directory / "merged")


@app.command()
def submit(
    search: SearchFile,
    address: Dashboard = _DASHBOARD,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", help="Run directory on the cluster [default: ~/evomerge-runs/NAME of the file]."
        ),
    ] = None,
    set_: Set = None,
    pip: Annotated[
        list[str] | None, typer.Option(metavar="REQUIREMENT", help="Install this for the job.", show_default=False)
    ] = None,
    ca: Ca = None,
    insecure: Insecure = False,
) -> None:
    """Run a search as a job of a Ray cluster; the same directory again goes on with it."""
    from evomerge.config import files
    from evomerge.reports import terminal
    from evomerge.runs import cluster

    loaded = files.load(search, set_ or [])
    job = cluster.Cluster(address, ca, insecure).submit(
        loaded, search.stem, output or f"~/evomerge-runs/{search.stem}", pip or []
    )
    for note in cluster.notes(loaded):
        terminal.fail(f"note: {note}")
    terminal.console().print(f"{job} submitted; follow it with `evomerge logs {job} --follow`", markup=False)


@app.command()
def jobs(address: Dashboard = _DASHBOARD, ca: Ca = None, insecure: Insecure = False, as_json: AsJson = False) -> None:
    """The searches on a Ray cluster."""
    from dataclasses import asdict

    from evomerge.reports import terminal
    from evomerge.runs import cluster

    found = cluster.Cluster(address, ca, insecure).jobs()
    if as_json:
        return _print_json([asdict(job) for job in found])
    for job in found:
        terminal.console().print(f"{job.id}  {job.state}  {job.directory}", markup=False)
    return None


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
    address: Dashboard = _DASHBOARD,
    ca: Ca = None,
    insecure: Insecure = False,
) -> None:
    """What a job prints; with --follow the exit status says how it ended."""
    from evomerge.reports import terminal
    from evomerge.runs import cluster

    head = cluster.Cluster(address, ca, insecure)
    if not follow:
        sys.stdout.write(head.logs(job))
        return
    ended = head.follow(job, lambda lines: print(lines, end="", flush=True))
    terminal.fail(f"{job} {ended.state}")
    if ended.state == "failed":
        raise typer.Exit(1)


@app.command()
def stop(job: JobId, address: Dashboard = _DASHBOARD, ca: Ca = None, insecure: Insecure = False) -> None:
    """Stop a job as Ctrl-C does; what it has evaluated stays."""
    from evomerge.reports import terminal
    from evomerge.runs import cluster

    ended = cluster.Cluster(address, ca, insecure).stop(job)
    terminal.console().print(f"{job} {ended.state}; go on by submitting the search to {ended.directory} again")


@app.command(hidden=True)
def unpack(directory: RunDirectory, version: Annotated[str, typer.Option()]) -> None:
    """What a submitted job does first."""
    from evomerge.runs import cluster

    cluster.unpack(Path(), directory.expanduser(), version)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """The merge methods with models, parameters, what can be searched of them, and sources."""
    from evomerge.merging.methods import METHODS
    from evomerge.reports import terminal
    from evomerge.spaces.table import searchable

    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "base": method.base,
            "models": method.count,
            "per_model": [parameter.name for parameter in method.per_model],
            "shared": {parameter.name: parameter.default for parameter in method.shared},
            "search": [gene.row() for gene in searchable(method)],
            "paper": method.paper,
        }
        for method in METHODS.values()
    ]
    if as_json:
        return _print_json(rows)
    return terminal.show_methods(terminal.console(), rows)


@app.command()
def spaces(as_json: AsJson = False) -> None:
    """The kinds of search spaces with their options, genes and sources."""
    from evomerge.config.tables import SPACES
    from evomerge.reports import terminal
    from evomerge.spaces.table import space_row

    rows = [space_row(kind, space) for kind, space in SPACES.items()]
    if as_json:
        return _print_json(rows)
    return terminal.show_spaces(terminal.console(), rows)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def main() -> None:
    """Runs a command and turns every expected error into one sentence and an exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    atexit.register(gc.freeze)  # or else Python goes through all objects of all libraries before it ends: a second
    try:
        result = app(sys.argv[1:] or ["--help"], prog_name="evomerge", standalone_mode=False)
    except EvomergeError as error:
        _fail(str(error), error.exit_status)
    except typer.TyperException as error:
        _fail(_usage(error), getattr(error, "exit_code", 2))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a full disk, a file that was taken away: nothing that a traceback would explain better
        _fail(f"{error.filename or 'a file or connection'}: {error.strerror or error}.", EvomergeError.exit_status)
    sys.exit(result if isinstance(result, int) else 0)


_HABITS = {  # options of other programs, with what stands for them
    "--lazy-unpickle": "weights are read as they are needed, and pickles never",
    "--trust-remote-code": "code that comes with a model never runs",
    "--allow-crimes": "models of different architectures are refused",
    "--low-cpu-memory": "a merge never holds more than it needs",
    "--model_args": "the model is the argument, and dtype and batch size stand in the search file",
    "--tasks": "tasks stand below objectives in the search file",
    "--limit": "how many items there are stands below items in the search file",
}


def _usage(error: Any) -> str:
    """What is wrong with the command line, and where it is explained."""
    option = getattr(error, "option_name", None)
    if isinstance(error, typer.TyperException) and option in _HABITS:
        return f"{option} is an option of another program; leave it out: {_HABITS[option]}."
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "evomerge"
    return f"{error.format_message().rstrip('.')} (see `{command} --help`)."


def _fail(message: str, status: int) -> None:
    print(f"evomerge: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(status)
