"""Copies the zoo's models and gives their tokenizers a chat template: the form in which they were trained.

Usage: python make.py [FOLDER]    (by default, models beside this file)
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge import zoo

TEMPLATE = "{% for message in messages %}<bos> Q {{ message['content'] }} ={% endfor %}"

if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "models"
    for name in ("base", "math", "lang"):
        tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(place / name)
        AutoModelForCausalLM.from_pretrained(zoo.path(name)).save_pretrained(place / name)
        print(place / name)
