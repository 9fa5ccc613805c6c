"""vLLM's side of `engine`: a program, run by the interpreter of an environment that has vLLM but not evomerge.

Requests come on standard input and answers go to standard output, as one line of JSON each. Weights lie in memory that
is shared with the worker. The first request starts the engine. Every other request has it write: it loads the weights
that now lie in the memory, forgets what it cached with the previous weights, and writes greedy texts. After a failure
the engine cannot be trusted, so the process ends. It also ends as soon as its input does.
"""

import json
import math
import mmap
import os
import queue
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: its end is the engine's
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every worker's engine would take the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
START_SHARE = 0.05  # of a GPU's memory that must be free at the start; what vLLM takes is set in bytes


class Server:
    """A vLLM engine that takes its weights from shared memory."""

    def __init__(self, request: dict[str, Any]) -> None:
        """Starts the engine.

        request: the file descriptor of the shared memory and the tensors in it, the model's folder, and the engine's
            settings.
        """
        os.environ.update(SETTINGS, OMP_NUM_THREADS=str(request["threads"]))
        import torch
        from vllm import LLM

        shared = mmap.mmap(request["memory"], 0)
        self._weights = []
        for name, (dtype, shape, offset) in request["tensors"].items():
            count = math.prod(shape)
            tensor = torch.frombuffer(shared, dtype=getattr(torch, dtype), count=count, offset=offset)
            self._weights.append((name, tensor.view(shape)))
        self._engine = LLM(
            model=request["model"],
            load_format="dummy",  # the weights come with the first request
            dtype=request["dtype"],
            max_model_len=request["length"],
            max_num_seqs=request["batch_size"],
            kv_cache_memory_bytes=request["cache_bytes"],
            gpu_memory_utilization=START_SHARE,
            enforce_eager=request["eager"],
            enable_prefix_caching=True,
            generation_config="vllm",  # not the folder's: every prompt comes with all of its settings
            trust_remote_code=False,
            seed=0,
        )

    def write(self, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each prompt, the tokens that the present weights write, end token included, and their log-likelihood.

        prompts: for each its tokens, its stop strings and end tokens, and how many new tokens it may get.
        """
        from vllm import SamplingParams

        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights})
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the prefixes of the last candidate cannot be forgotten")
        settings = [
            SamplingParams(
                temperature=0.0,
                max_tokens=prompt["most"],
                stop=prompt["stop"],
                stop_token_ids=prompt["end"],
                ignore_eos=True,  # the end tokens are given
                repetition_penalty=prompt["repetition_penalty"],
                logprobs=0,
                skip_special_tokens=False,  # stop strings may be special tokens
                spaces_between_special_tokens=False,
            )
            for prompt in prompts
        ]
        asked = [{"prompt_token_ids": prompt["tokens"]} for prompt in prompts]
        texts = [output.outputs[0] for output in self._engine.generate(asked, settings, use_tqdm=False)]
        return [{"tokens": list(text.token_ids), "log_likelihood": text.cumulative_logprob} for text in texts]


def requests() -> Iterator[Any]:
    """Requests as they arrive. When the input ends, the process ends, even amid an answer: nobody would read it."""
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            arrived.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield arrived.get()


def main() -> None:
    """Answers requests until the input ends or a request fails; with `--check`, says whether vLLM is installed."""
    if sys.argv[1:] == ["--check"]:
        sys.exit(find_spec("vllm") is None)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    server = None
    for request in requests():
        try:
            if server is None:
                server = Server(request)
                answer: dict[str, Any] = {"ready": True}
            else:
                answer = {"texts": server.write(request["prompts"])}
        except Exception as error:  # the worker is told, and raises it as its own
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            os._exit(1)


if __name__ == "__main__":
    main()
