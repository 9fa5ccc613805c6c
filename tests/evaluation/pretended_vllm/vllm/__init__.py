"""As much of vLLM as the server asks for, by transformers. A file named by PRETENDED says how it misbehaves: `stale`
keeps the weights that it has, `broken` raises while it writes."""

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model, load_format, dtype, **settings):
        assert load_format == "dummy"
        print("a line that is no answer")
        config = AutoConfig.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.most = settings["max_model_len"]
        self.forgotten = False

    @staticmethod
    def behaves(how):
        return Path(os.environ["PRETENDED"]).read_text() == how

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        if not self.behaves("stale"):
            self.model.load_state_dict(dict(kwargs["weights_iterator"]))
        self.forgotten = False

    def reset_prefix_cache(self):
        self.forgotten = True
        return True

    def generate(self, prompts, settings, use_tqdm):
        assert self.forgotten
        if self.behaves("broken"):
            raise RuntimeError("out of\nmemory")
        return [self.write(prompt["prompt_token_ids"], each) for prompt, each in zip(prompts, settings, strict=True)]

    @torch.inference_mode()
    def write(self, prompt, settings):
        assert settings.temperature == 0
        assert len(prompt) + settings.max_tokens <= self.most
        tokens = []
        likelihood = 0.0
        while len(tokens) < settings.max_tokens:
            scores = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].log_softmax(-1)
            tokens.append(int(scores.argmax()))
            likelihood += float(scores[tokens[-1]])
            text = self.tokenizer.decode(tokens)
            if tokens[-1] in settings.stop_token_ids or any(stop in text for stop in settings.stop):
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, cumulative_logprob=likelihood)])
