"""What a reward model says of the beginnings of an answer: decoded text, and the classifier's own
forward on one beginning at a time.
"""

import itertools

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def agree(a, b):
    """How many characters two texts begin with alike."""
    return sum(itertools.takewhile(bool, (x == y for x, y in zip(a, b, strict=False))))


def completed(tokenizer, ids, answer):
    """How much of the answer the first 0, 1, ... of ids have completed, by decoding them."""

    def decode(part):
        return tokenizer.decode(part, clean_up_tokenization_spaces=False)

    whole = decode(ids)
    place = whole.rindex(answer)
    counts = []
    for n in range(len(ids) + 1):
        said = agree(decode(ids[:n]), whole)
        counts.append(min(max(said - place, 0), len(answer)))
    return counts


def alone(model, ids, label=0):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, label].double().item()


def expected(path, response, *, label=0, beta_c=1.0):
    """Eq. 6-7 of one answer in one message, and R of it and of no answer."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    answer = response.text
    if isinstance(response.prompt, str):
        ids = tokenizer(response.prompt + answer)["input_ids"]
    else:
        turns = [*response.prompt, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    theirs = completed(tokenizer, ids, answer)
    # the last beginning that decodes to nothing of the answer, and not to a part of its characters
    head = len(tokenizer.decode(ids)[: tokenizer.decode(ids).rindex(answer)])
    before = max(n for n in range(len(ids)) if len(tokenizer.decode(ids[:n])) <= head)
    policys = [*response.prompt_ids.tolist(), *response.ids.tolist()]
    mine = completed(response.tokenizer, policys, answer)[len(response.prompt_ids) + 1 :]
    ends = [before]
    for count in mine:
        best = max((c for c in theirs if 0 < c <= count), default=0)
        ends.append(theirs.index(best) if best else before)
    scores = {end: alone(model, ids[:end], label) for end in {*ends, len(ids)}}
    values, whole = [scores[end] for end in ends], scores[len(ids)]
    found = np.diff(values)
    end = min(response.content, len(found) - 1)
    found[end] += whole - values[-1]
    found *= beta_c
    found[end] += (1 - beta_c) * whole
    return found, whole, values[0]
