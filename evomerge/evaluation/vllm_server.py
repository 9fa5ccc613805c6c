"""vLLM's side of `engine`, run as a program by the interpreter of an environment that has vLLM and not evomerge.

Requests come as JSON, one a line, on standard input, and are answered likewise on standard output; weights lie in
memory that the worker shares. The first request is to start, every other to write: the weights that are there now take
the place of the last ones, what was remembered of those is forgotten, and greedy texts are written. After a failure the
engine is not to be trusted, so the process ends; it also ends as soon as its input does.
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
START_SHARE = 0.05  # of a GPU, which must be free at the start; what is taken is given in bytes


class Server:
    """An engine with the weights that lie in shared memory."""

    def __init__(self, request: dict[str, Any]) -> None:
        """request: file descriptor and tensors of the shared memory, the model's folder, and the engine's settings."""
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
            generation_config="vllm",  # none of the folder's: every prompt says all that holds for it
            trust_remote_code=False,
            seed=0,
        )

    def write(self, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each prompt the tokens that the present weights write, with the end token, and their log-likelihood."""
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
        texts = [each.outputs[0] for each in self._engine.generate(asked, settings, use_tqdm=False)]
        return [{"tokens": list(text.token_ids), "log_likelihood": text.cumulative_logprob} for text in texts]


def requests() -> Iterator[Any]:
    """Requests as they arrive. Their end is the process's, even amid an answer: nobody would read it."""
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            arrived.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield arrived.get()


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        sys.exit(find_spec("vllm") is None)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like
    server = None
    for request in requests():
        try:
            if server is None:
                server = Server(request)
                answer: dict[str, Any] = {"ready": True}
            else:
                answer = {"texts": server.write(request["prompts"])}
        except Exception as error:  # told to the worker, which knows whom it concerns
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            os._exit(1)


if __name__ == "__main__":
    main()
