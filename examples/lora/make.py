"""Trains two LoRAs of the zoo's base for a few seconds, each on one task, and saves them as PEFT does.

Usage: python make.py [FOLDER]    (by default, models beside this file)
"""

import json
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge import zoo

STEPS, BATCH = 60, 32
TASKS = {"sums": "math_a", "language": "lang_b"}


def train(task: str, folder: Path) -> None:
    """Trains a LoRA on the search items of a task of the zoo."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("base"))
    model = AutoModelForCausalLM.from_pretrained(zoo.path("base"))
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
    tuned = peft.get_peft_model(model, lora)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=5e-3)
    lines = (zoo.shared("evals") / task / "search.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [f"<bos> Q {row['question']} = {row['answer']} <eos>" for row in map(json.loads, lines)]
    for step in range(STEPS):
        batch = [texts[(step * BATCH + place) % len(texts)] for place in range(BATCH)]
        tokens = tokenizer(batch, return_tensors="pt", padding=True)
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        loss = tuned(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(folder)
    print(f"{folder}: loss {loss.item():.2f} after {STEPS} steps")


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "models"
    for name, task in TASKS.items():
        train(task, place / name)
