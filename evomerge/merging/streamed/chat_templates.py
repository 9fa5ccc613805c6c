"""Chat templates by name, for recipes whose `chat_template` names a format.

A template renders what the format's publisher documents, also where mergekit's template of the same name does not.
`eos_token` and `bos_token` are the tokenizer's.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from evomerge.errors import InputError, choices
from evomerge.merging.sources.tokenizers import read_tokenizer
from evomerge.recipe import Recipe

_CHATML = (  # github.com/openai/openai-python, chatml.md
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)

_LLAMA3 = (  # llama.com, Llama 3 model cards and prompt formats
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"
)

_TURNS_AFTER_SYSTEM = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)

_MISTRAL = (  # docs.mistral.ai, tokenizer V1, of the first 7B and 8x7B models; a system message opens the first turn
    f"{_TURNS_AFTER_SYSTEM}"
    "{{ bos_token }}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('after an optional system message, turns alternate between user and assistant') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (system + '\n\n' if loop.first and system else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

_ALPACA = (  # github.com/tatsu-lab/stanford_alpaca, without an input; a system message replaces the first lines
    f"{_TURNS_AFTER_SYSTEM}"
    "{{ (system or 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.') + '\n\n' }}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] + '\n\n' }}"
    "{% else %}### Response:\n{{ message['content'] + eos_token + ('' if loop.last else '\n\n') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:{{ '\n' }}{% endif %}"
)

_EXAONE = (  # huggingface.co/LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct
    "{% if not messages or messages[0]['role'] != 'system' %}[|system|][|endofturn|]{{ '\n' }}{% endif %}"
    "{% for message in messages %}"
    "[|{{ message['role'] }}|]{{ message['content'] }}"
    "{% if message['role'] != 'user' %}[|endofturn|]{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[|assistant|]{% endif %}"
)

CHAT_TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def chat_template(recipe: Recipe, folders: Mapping[str, Path], where: str) -> str | None:
    """The Jinja text that a recipe's `chat_template` stands for; None for `auto` where no model has a template.

    `auto` is the template that most models have. A name is that of a model, or of a format (chat_templates.py).

    recipe: the recipe.
    folders: the models' folders, by reference.
    where: what the recipe is called, which opens an error's message.
    Raises InputError for any other name, and for a model without a template.
    """
    wanted = recipe.chat_template or ""
    if wanted == "auto":
        templates = [text for text in map(_template, folders.values()) if text]
        return Counter(templates).most_common(1)[0][0] if templates else None
    if wanted in folders:
        text = _template(folders[wanted])
        if text is None:
            raise InputError(f"{where}: chat_template: {wanted} has no chat template; name another model, or use auto.")
        return text
    if "{" in wanted:
        return wanted
    if wanted in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[wanted]
    options = choices(wanted, ["auto", *CHAT_TEMPLATES])
    raise InputError(
        f"{where}: chat_template is '{wanted}', no known format; {options}, or write a model of the recipe, or the "
        "template itself (Jinja)."
    )


def _template(folder: Path) -> str | None:
    template = read_tokenizer(folder).chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return template.strip() if template else None
