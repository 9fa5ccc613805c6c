"""Chat templates: each renders the strings that its publisher documents, here written out."""

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from evomerge.merging.streamed.chat_templates import CHAT_TEMPLATES

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello!"}
HI = {"role": "assistant", "content": "Hi."}
WHO = {"role": "user", "content": "Who are you?"}
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def rendered(name, messages, prompt):
    (text,), _ = render_jinja_template(
        [messages],
        chat_template=CHAT_TEMPLATES[name],
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    return text


ASKED = {
    "chatml": "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Hello! [/INST]",
    "alpaca": ALPACA + "### Instruction:\nHello!\n\n### Response:\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Hello!\n[|assistant|]",
}
TALK = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
    "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHello! [/INST] Hi.</s> [INST] Who are you? [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHello!\n\n### Response:\nHi.</s>\n\n"
    "### Instruction:\nWho are you?\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hello!\n[|assistant|]Hi.[|endofturn|]\n"
    "[|user|]Who are you?\n[|assistant|]",
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_question_is_rendered_as_documented(name):
    assert rendered(name, [HELLO], prompt=True) == ASKED[name]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_talk_with_a_system_message_is_rendered_as_documented(name):
    assert rendered(name, [SYSTEM, HELLO, HI, WHO], prompt=True) == TALK[name]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_an_answered_talk_is_where_its_question_leads(name):
    """What training sees is what generation continues: the prompt, the answer, the end of the turn."""
    prompt, whole = rendered(name, [HELLO], prompt=True), rendered(name, [HELLO, HI], prompt=False)
    assert whole.startswith(prompt)
    assert whole.removeprefix(prompt).strip().startswith("Hi.")
    assert len(whole) > len(prompt) + len(" Hi.")


def test_a_talk_that_mistral_knows_no_words_for_is_refused():
    with pytest.raises(TemplateError, match="alternate"):
        rendered("mistral", [HELLO, WHO], prompt=True)
