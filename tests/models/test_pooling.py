"""Laws of pooling: the mean of the tokens that are there, and folders that two other libraries read."""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForSequenceClassification,
    pipeline,
)

from etf_adapt.heads.alignment import align_head
from etf_adapt.heads.in_model import head_modules, read_features
from etf_adapt.inference.predictions import load_stock
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification
from etf_adapt.models.pooling import MeanPoolingForSequenceClassification
from etf_adapt.training.arguments import ETFTrainingArguments
from etf_adapt.training.trainer import ETFTrainer

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
DISTILBERT = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 40}
ENCODERS = {
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**DISTILBERT)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**BERT)),
}
NAMES = {0: "a", 1: "b", 2: "c"}


def save_encoder(folder: Path, kind: str = "bert", *, pooling: str | None = None) -> Path:
    torch.manual_seed(0)
    ENCODERS[kind]().save_pretrained(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))
    return folder


def texts(rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.arange(rows) % 4 + 2
    mask = (torch.arange(5) < lengths.unsqueeze(1)).long()
    return {"input_ids": torch.randint(2, 40, (rows, 5), generator=generator) * mask, "attention_mask": mask}


def load(folder: Path, **options):
    return ETFForSequenceClassification.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_feature_is_the_mean_of_the_tokens_that_are_there(kind, tmp_path):
    model = load(save_encoder(tmp_path, kind), num_labels=3, pooling="mean")
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    batch = texts()
    (features,) = read_features(model, batch)
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
        expected = encoder(**alone).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(features[row], expected, atol=1e-5, rtol=1e-5)
        head = head_modules(model)["classifier"]
        torch.testing.assert_close(model(**batch).logits[row], head(expected.unsqueeze(0))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("head", ["etf", "linear", "cosine", "paper"])
def test_a_folder_comes_back_and_so_does_a_checkpoint(kind, head, tmp_path):
    model = load(save_encoder(tmp_path / "encoder", kind), id2label=NAMES, pooling="mean", head=head)
    batch = texts()
    if head in ("etf", "cosine"):
        align_head(model, [{**batch, "labels": torch.arange(6) % 3}])
    logits = model(**batch).logits
    for folder in (tmp_path / "out", tmp_path / "checkpoint-7"):
        model.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            back = load(folder)
        folded = head in ("cosine", "paper") and folder.name == "out"
        assert back.etf_settings["head"]["folded"] == folded and back.etf_settings["pooling"] == "mean"
        assert dict(back.config.id2label) == NAMES
        if folded:
            assert torch.equal(back(**batch).logits.argmax(dim=1), logits.argmax(dim=1))
        else:
            assert torch.equal(back(**batch).logits, logits)
            assert {**back.etf_settings, "head": {}} == {**model.etf_settings, "head": {}}
    if head in ("cosine", "paper"):
        with pytest.raises(ValueError, match="training checkpoint with a head"):
            load_stock(tmp_path / "checkpoint-7", "text")
    stock = load_stock(tmp_path / "out", "text")
    assert type(stock) is MeanPoolingForSequenceClassification
    assert torch.equal(stock(**batch).logits, load(tmp_path / "out")(**batch).logits)


def test_a_checkpoint_that_another_tool_changed_loads_as_it_stands_and_one_that_lacks_weights_is_refused(tmp_path):
    model = load(save_encoder(tmp_path / "encoder"), id2label=NAMES, pooling="mean")
    model.set_calibration(2.0)
    model.save_pretrained(tmp_path / "checkpoint-7")
    file = tmp_path / "checkpoint-7" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "classifier.weight": 2.0 * tensors["classifier.weight"]}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="another tool has changed it since"):
        back = load(tmp_path / "checkpoint-7")
    assert back.etf_settings["head"]["frame"] == "changed" and back.etf_settings["logit_scale"] == 1.0
    torch.testing.assert_close(back.classifier.weight, 2.0 * model.classifier.weight)
    save_file(
        {name: value for name, value in tensors.items() if "layer.0" not in name}, file, metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"checkpoint-7 cannot be loaded: .* lack "):
        load(tmp_path / "checkpoint-7")


def refused(load, *arguments, **options):
    with pytest.raises(ValueError, match="load it with etf_adapt or, where modules"):
        load(*arguments, **options)


@pytest.mark.parametrize("kind", ENCODERS)
def test_stock_classes_refuse_a_folder_that_they_would_read_with_a_random_classifier(kind, tmp_path):
    model = load(save_encoder(tmp_path / "encoder", kind), num_labels=3, pooling="mean")
    for name in ("out", "checkpoint-7"):
        folder = str(tmp_path / name)
        model.save_pretrained(folder)
        for stock in (AutoModelForSequenceClassification, AutoModel):
            refused(stock.from_pretrained, folder)
        refused(pipeline, "text-classification", model=folder)
        assert torch.equal(load(folder)(**texts()).logits, model(**texts()).logits)


def test_the_encoder_of_a_folder_is_read_by_transformers_on_request_without_a_word(tmp_path, caplog):
    model = load(save_encoder(tmp_path / "encoder"), num_labels=3, pooling="mean")
    model.save_pretrained(tmp_path / "out")
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        encoder = AutoModel.from_pretrained(tmp_path / "out", transformers_weights=None)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert type(encoder) is BertModel
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name])
    encoder.save_pretrained(tmp_path / "theirs")  # an encoder like any other
    assert type(AutoModel.from_pretrained(tmp_path / "theirs")) is BertModel


def test_sentence_transformers_gives_the_logits(minilm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    model = load(minilm, id2label=NAMES, pooling="mean")
    said = ["what a day", "the second of these texts has more words", "cats", "the bank is closed today"]
    encoded = dict(model.processor(said, padding=True, return_tensors="pt"))
    align_head(model, [{**encoded, "labels": torch.tensor([0, 1, 2, 2])}])
    model.set_calibration(3.0, [0.5, 0.0, -0.5])
    model.save_pretrained(tmp_path)
    other = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert other[0].auto_model.config.id2label == NAMES
    torch.testing.assert_close(
        other.encode(said, convert_to_tensor=True), model(**encoded).logits, atol=1e-5, rtol=1e-5
    )


def test_texts_are_cut_to_the_positions_that_a_model_can_use(tmp_path):
    RobertaModel(RobertaConfig(**BERT, max_position_embeddings=12, pad_token_id=1)).save_pretrained(
        tmp_path / "encoder"
    )
    load(tmp_path / "encoder", num_labels=3, pooling="mean").save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/sentence_bert_config.json").read_text())["max_seq_length"] == 10


def test_a_class_that_can_be_set_to_the_mean_stays_a_stock_class(tmp_path):
    config = ModernBertConfig(**{**BERT, "pad_token_id": 0}, classifier_pooling="cls")
    ModernBertForSequenceClassification(config).save_pretrained(tmp_path / "encoder")
    model = load(tmp_path / "encoder", num_labels=3, pooling="mean")
    assert isinstance(model, ModernBertForSequenceClassification) and model.config.classifier_pooling == "mean"
    assert model.etf_settings["pooling"] == "stock"
    model.save_pretrained(tmp_path / "out")
    stock = load_stock(tmp_path / "out", "text").eval()
    assert type(stock) is ModernBertForSequenceClassification and stock.config.classifier_pooling == "mean"
    assert torch.equal(stock(**texts()).logits, model(**texts()).logits)


def test_another_pooling_than_the_saved_one_brings_a_new_head(tmp_path):
    load(save_encoder(tmp_path / "encoder"), num_labels=3, pooling="mean").save_pretrained(tmp_path / "mean")
    with pytest.warns(UserWarning, match="is replaced by a new one"):
        model = load(tmp_path / "mean", pooling="stock")
    assert type(model).__name__ == "BertForSequenceClassification"
    model.save_pretrained(tmp_path / "stock")
    with pytest.warns(UserWarning, match="is replaced by a new one"):
        assert load(tmp_path / "stock", pooling="mean").etf_settings["pooling"] == "mean"


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "newer form", None])
def test_an_encoder_trained_for_the_mean_says_so_once(pooling, tmp_path):
    folder = save_encoder(tmp_path, pooling=pooling)
    if pooling == "newer form":
        (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 16, "pooling_mode": "mean"}')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(folder, num_labels=3)
        load(folder, num_labels=3, pooling="stock")
        load(folder, num_labels=3, pooling="mean")
    told = [str(warning.message) for warning in said if "pooling" in str(warning.message)]
    assert len(told) == (pooling in ("mean_tokens", "newer form"))
    assert not told or ("--pooling mean" in told[0] and "SentenceTransformer and etf_adapt" in told[0])


def test_what_cannot_be_is_refused(tmp_path):
    T5ForSequenceClassification(
        T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, vocab_size=40)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="encoder and a decoder"):
        load(tmp_path / "t5", num_labels=3, pooling="mean")
    with pytest.raises(ValueError, match="pooling"):
        load(save_encoder(tmp_path), num_labels=3, pooling="meen")
    with pytest.raises(ValueError, match=r"`pooling` \(='mean'\) is for texts"):
        ETFForImageClassification.from_pretrained("timm/test_vit.r160_in1k", pretrained=False, pooling="mean")


def test_a_lost_connection_is_not_taken_for_a_lost_layer(hub, online, tmp_path, monkeypatch):
    load(save_encoder(tmp_path / "encoder"), num_labels=3, pooling="mean").save_pretrained(tmp_path / "out")
    files = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    hub.seed("me/net", {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in files})
    hub.fail("HEAD", "2_Dense/model", status=503, times=math.inf)
    with pytest.raises(OSError):
        load("me/net", cache_dir=tmp_path / "cache")
    hub.heal()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("me/net", cache_dir=tmp_path / "cache").etf_settings["pooling"] == "mean"


class Rows(Dataset):
    """Token ids (5,) of which the first tells the class."""

    def __init__(self, counts: tuple[int, ...] = (20, 8, 4)) -> None:
        self.labels = np.repeat(np.arange(len(counts)), counts)
        self.ids = torch.randint(10, 40, (len(self.labels), 5), generator=torch.Generator().manual_seed(2))
        self.ids[:, 0] = torch.from_numpy(self.labels) + 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict:
        mask = torch.ones(5, dtype=torch.int64)
        return {"input_ids": self.ids[row], "attention_mask": mask, "labels": int(self.labels[row]), "row_id": row}


def make_trainer(encoder: Path, output_dir: Path, **settings) -> ETFTrainer:
    model = ETFForSequenceClassification.from_pretrained(encoder, num_labels=3, pooling="mean")
    args = ETFTrainingArguments(
        str(output_dir), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-2, save_strategy="steps",
        save_steps=3, eval_strategy="steps", eval_steps=3, save_total_limit=None, torch_threads=1, **settings,
    )  # fmt: skip
    rows = Rows()
    return ETFTrainer(model, args, train_dataset=rows, eval_dataset=rows, labels=rows.labels)


def test_a_resumed_run_ends_as_the_uninterrupted_one_and_the_pooler_stays(tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    whole = make_trainer(encoder, tmp_path / "whole", load_best_model_at_end=False)
    before = {name: tensor.clone() for name, tensor in whole.model.encoder.pooler.state_dict().items()}
    whole.train()
    resumed = make_trainer(encoder, tmp_path / "resumed", load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert all(torch.equal(whole.model.encoder.pooler.state_dict()[name], tensor) for name, tensor in before.items())
    assert whole.evaluate()["eval_balanced_accuracy"] == 1.0
