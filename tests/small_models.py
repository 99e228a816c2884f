"""Small models of each kind of folder, adapted to three classes; their inputs and processors."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from etf_adapt.heads.in_model import head_modules
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt
from etf_adapt.models.pooling import MeanPoolingForSequenceClassification

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NAMES = {0: "ash", 1: "birch", 2: "cedar"}
LABELS = torch.tensor([0, 2, 1, 1])


def stock_vit(num_labels=5):
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=num_labels)).eval()


def stock_bert():
    return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=20, max_position_embeddings=32)).eval()


def stock_llama():
    config = LlamaConfig(**SIZES, vocab_size=20, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0)
    return LlamaForSequenceClassification(config).eval()


def vit(**settings):
    return adapt(stock_vit(), 3, id2label=NAMES, **settings)


def bert(**settings):
    return adapt(stock_bert(), 3, id2label=NAMES, **settings)


def llama(**settings):
    return adapt(stock_llama(), 3, id2label=NAMES, **settings)


def resnet(**settings):
    name = "timm/test_resnet.r160_in1k"
    return ETFForImageClassification.from_pretrained(name, id2label=NAMES, pretrained=False, **settings).eval()


def micro(**settings):
    return ETFForImageClassification.from_pretrained("micro", id2label=NAMES, **settings)


def pooled(**settings):
    config = BertConfig(**SIZES, vocab_size=20, max_position_embeddings=32)
    return adapt(MeanPoolingForSequenceClassification(config).eval(), 3, id2label=NAMES, **settings)


MAKERS = {"vit": vit, "resnet": resnet, "micro": micro, "bert": bert, "llama": llama}
KINDS = {"vit": vit, "resnet": resnet, "bert": bert, "llama": llama, "pooled": pooled}  # one of each kind of folder


def is_text(name):
    return name in ("bert", "llama", "pooled")


def factory(name):
    return ETFForSequenceClassification if is_text(name) else ETFForImageClassification


def batch(name):
    generator = torch.Generator().manual_seed(3)
    if is_text(name):
        return {"input_ids": torch.randint(1, 20, (4, 7), generator=generator)}
    return {"pixel_values": torch.randn(4, 3, *((8, 8) if name == "vit" else (32, 32)), generator=generator)}


def processor(name):
    if name == "vit":
        return ViTImageProcessor(size={"height": 8, "width": 8})
    if is_text(name):
        tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "tree": 3}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=["input_ids"]
        )
    return None


def pair_tokenizer():
    """Make a tokenizer that tells the second text of a pair from the first, as BERT's does."""
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "tree": 3, "[SEP]": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B:1 [SEP]:1", special_tokens=[("[SEP]", 4)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_input_names": ["input_ids", "token_type_ids"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_tokenizer(folder, **tokens):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "[PAD]": 2, "tree": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **tokens).save_pretrained(folder)


def finished(name, seed=0):
    """Make a model as a run leaves it: rows of its own, calibrated, with its processor."""
    torch.manual_seed(seed)
    model = {**MAKERS, **KINDS}[name](class_counts=[9, 3, 1], loss={"name": "dot_regression", "form": "one_sided"})
    for head in head_modules(model).values():
        weight, _ = head.class_vectors()
        bias = None if head.bias is None else torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
        head.set_class_vectors(torch.randn(weight.shape), bias, frame="means")
    model.set_calibration(2.5, None if name == "llama" else [0.5, 0.0, -0.5])
    model.processor = processor(name)
    return model


def the_head(model):
    return next(iter(head_modules(model).values()))


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits
