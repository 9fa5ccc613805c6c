"""A resident vLLM engine in an environment of its own, which writes texts with the weights of the worker's model.

vLLM needs other versions of torch and transformers, so it runs in a process of another interpreter. That process and
the worker share a piece of memory. It has no name, so that it is freed when both have ended. The worker copies each
candidate's weights there, and the engine loads them in place of the previous weights. Requests and answers are JSON
over pipes.

The engine's results are checked. For every candidate, the worker's own model scores the least likely of the texts,
since that text depends most on the weights, and must compute the log-likelihood that the engine reports.
"""

import contextlib
import json
import math
import mmap
import os
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from evomerge.config.scoring import EvaluationConfig
from evomerge.errors import CandidateFailed, InputError, WorkerPoisoned
from evomerge.evaluation import vllm_server
from evomerge.evaluation.generation import GenerationBatch
from evomerge.evaluation.likelihoods import PreparedRequests, Request, tolerance

_ALIGNED = 64  # bytes
_KEY = "evaluation.vllm"


def check_interpreter(python: str) -> None:
    """Checks that an interpreter can be run and has vLLM.

    python: the interpreter's path.
    Raises InputError where it cannot be run or has no vLLM.
    """
    try:
        outcome = subprocess.run([*_command(python), "--check"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "it does not answer"
        raise InputError(
            f"{_KEY}.python is {python}, which cannot be run ({reason}); name the interpreter of an environment that "
            "has vLLM, such as vllm_env/bin/python."
        ) from None
    if outcome.returncode != 0:
        raise InputError(f"{_KEY}.python is {python}, whose environment has no vLLM; install it there.")


def _command(python: str) -> list[str]:
    return [python, "-I", vllm_server.__file__]  # -I: nothing of our own environment or folder is imported there


class Engine:
    """A vLLM engine that writes texts with the weights of one resident model."""

    def __init__(
        self, evaluation: EvaluationConfig, folder: Path, model: Any, weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Takes the model; `start` starts the engine.

        evaluation: the settings of the evaluation, those of vLLM among them.
        folder: the folder with the model's config and tokenizer.
        model: the resident model.
        weights: the model's parameters, by the names that they have in checkpoints.
        """
        self._evaluation, self._folder, self._model, self._weights = evaluation, folder, model, weights
        self._length = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self, batches: Sequence[GenerationBatch]) -> None:
        """Starts the engine and has it write the texts of the first batch, as a check.

        batches: the texts to be written for all splits; the longest of them sets the engine's context.
        Raises InputError where the engine cannot be started, or does not compute what the model computes.
        """
        self._length = max(batch.ids.shape[1] + batch.fresh for batch in batches)
        file, tensors = self._share()
        self._launch(file)
        try:
            self._ask({"memory": file, "tensors": tensors, **self._settings()})
            self.write(batches[:1])
        except (WorkerPoisoned, CandidateFailed) as error:
            reason = str(error).rstrip(".")
            raise InputError(f"{_KEY}: {reason}; change the settings there, or use evaluation.backend hf.") from None
        finally:
            os.close(file)

    def write(self, batches: Sequence[GenerationBatch]) -> list[list[list[int]]]:
        """The texts of batches, written with the model's present weights; see `generation.Writer`.

        Raises CandidateFailed where a log-likelihood is not a number or differs from the model's, and WorkerPoisoned
        where the engine has ended.
        """
        for name, parameter in self._weights.items():
            self._shared[name].copy_(parameter.detach())
        prompts = [self._prompt(batch, tokens) for batch in batches for tokens in batch.prompts]
        texts = self._ask({"prompts": prompts})["texts"]
        self._compare(prompts, texts)
        written = iter([text["tokens"] for text in texts])
        return [[next(written) for _ in batch.members] for batch in batches]

    def _prompt(self, batch: GenerationBatch, tokens: list[int]) -> dict[str, Any]:
        own = self._model.generation_config
        end = own.eos_token_id
        return {
            "tokens": tokens,
            "stop": [text for text in batch.stop if text],
            "end": end if isinstance(end, list) else [end] if end is not None else [],
            "most": batch.fresh,
            "repetition_penalty": batch.arguments.get("repetition_penalty") or own.repetition_penalty or 1.0,
        }

    def _compare(self, prompts: Sequence[Mapping[str, Any]], texts: Sequence[Mapping[str, Any]]) -> None:
        """Raises CandidateFailed where model and engine give the least likely text different log-likelihoods."""
        if any(math.isnan(text["log_likelihood"]) for text in texts):
            raise CandidateFailed("a log-likelihood of a written text is not a number")
        prompt, text = min(zip(prompts, texts, strict=True), key=lambda pair: pair[1]["log_likelihood"])
        request = Request(tuple(prompt["tokens"]), tuple(text["tokens"]))
        scored = PreparedRequests([request], 1, self._length, self._model.device).run(self._model)[0]
        difference = abs(scored.log_likelihood - text["log_likelihood"])
        if not difference <= tolerance(self._model.dtype) * len(text["tokens"]):
            raise CandidateFailed(
                f"vLLM's log-likelihood of a text that it wrote is {text['log_likelihood']:.4g}, but "
                f"transformers' is {scored.log_likelihood:.4g} with the same weights."
            )

    def _share(self) -> tuple[int, dict[str, tuple[str, list[int], int]]]:
        """Makes the shared memory. Returns its file descriptor, and each tensor's dtype, shape and offset there."""
        tensors, end = {}, 0
        for name, weight in self._weights.items():
            tensors[name] = (str(weight.dtype).removeprefix("torch."), list(weight.shape), end)
            end += math.ceil(weight.nbytes / _ALIGNED) * _ALIGNED
        file = os.memfd_create("evomerge-weights")
        os.truncate(file, end)
        memory = mmap.mmap(file, end)
        self._shared = {
            name: torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=tensors[name][2]).view(
                weight.shape
            )
            for name, weight in self._weights.items()
        }
        return file, tensors

    def _settings(self) -> dict[str, Any]:
        evaluation = self._evaluation
        return {
            "model": str(self._folder),
            "dtype": evaluation.dtype,
            "length": self._length,
            "batch_size": evaluation.batch_size,
            "threads": evaluation.threads,
            "cache_bytes": int(evaluation.vllm.cache_gib * 2**30),
            "eager": evaluation.vllm.eager,
        }

    def _launch(self, file: int) -> None:
        assert self._evaluation.vllm.python is not None  # as the config has been checked
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            _command(self._evaluation.vllm.python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            pass_fds=(file,),
            text=True,
        )
        weakref.finalize(self, _stop, self._process, self._log)

    def _ask(self, request: Mapping[str, Any]) -> Any:
        """The engine's answer to a request. Raises WorkerPoisoned where it gives none."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdin.closed:
            raise WorkerPoisoned("vLLM has ended; resume in a new process.")
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except OSError:
            line = ""
        answer = json.loads(line) if line.endswith("\n") else {"error": self._last_words()}
        if "error" in answer:
            _stop(process, self._log)
            raise WorkerPoisoned(f"vLLM has ended ({answer['error'].rstrip('.')}).")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "its process has ended"


def _stop(process: "subprocess.Popen[str]", log: IO[bytes]) -> None:
    """Ends the engine's process, and closes its pipes and its log."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, log):
        assert pipe is not None
        with contextlib.suppress(OSError):  # closing writes what is left in the buffer, which nobody reads any more
            pipe.close()
