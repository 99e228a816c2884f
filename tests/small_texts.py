"""Texts of three uneven classes in csv files, and a stock text classifier of random weights: what a stranger would have."""

from __future__ import annotations

import csv

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

NAMES = ["cedar", "ash", "birch"]  # in the model's order, which is not that of the names
WORDS = [f"w{number}" for number in range(30)]


def rows(counts, seed):
    """Draw texts of six words, about half of them words of the text's class."""
    generator = np.random.default_rng(seed)
    found = []
    for place, (name, count) in enumerate(counts.items()):
        own = WORDS[5 * place : 5 * place + 5]
        for _ in range(count):
            first = generator.choice(own[:2] if generator.random() < 0.9 else WORDS)  # what the feature depends on most
            found.append((" ".join([first, *generator.choice(own, 2), *generator.choice(WORDS, 3)]), name))
    return [found[index] for index in generator.permutation(len(found))]


def write(folder, **splits):
    """Write each split to a csv file, and return the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        with open(folder / f"{split}.csv", "w", newline="") as stream:
            csv.writer(stream).writerows([("text", "label"), *texts])
    return str(folder)


def stock_folder(folder, names=NAMES, *, is_decoder=False):
    """Save a stock classifier with random weights and its tokenizer; a decoder's has no bias and no padding token."""
    torch.manual_seed(0)
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{word: index for index, word in enumerate(WORDS, start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = (LlamaConfig if is_decoder else BertConfig)(
        **sizes,
        vocab_size=len(vocabulary),
        max_position_embeddings=16,
        initializer_range=0.4,  # by which the feature depends on the words
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    (LlamaForSequenceClassification if is_decoder else BertForSequenceClassification)(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return str(folder)
