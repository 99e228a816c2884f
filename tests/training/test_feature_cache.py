"""Laws of kept features: a frozen backbone read once gives the run that it gives when it is read again and again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_run import COUNTS, NoisyRows, collate, make_model
from transformers import BertConfig, BertForSequenceClassification, TimmWrapperConfig, TimmWrapperForImageClassification

from etf_adapt.data.image_dataset import RowDraw, RowDraws
from etf_adapt.heads.in_model import head_modules, read_features
from etf_adapt.models.auto import adapt
from etf_adapt.training.arguments import ETFTrainingArguments
from etf_adapt.training.feature_cache import CachedFeatures, FeatureCollator, cache_features
from etf_adapt.training.trainer import ETFTrainer


class Labelled(NoisyRows):
    """Rows that tell their labels as a data set does, and give each draw noise of its own."""

    @property
    def dataset(self):
        from datasets import Dataset

        return Dataset.from_dict({"label": self.labels})

    def __getitem__(self, row):
        found = super().__getitem__(row)
        if isinstance(row, RowDraw):
            generator = torch.Generator().manual_seed(1000 * row.epoch + int(row))
            found["pixel_values"] = found["pixel_values"] + torch.randn(3, 8, 8, generator=generator)
        return found


class Plain(Labelled):
    """Rows that are the same in each draw."""

    def __getitem__(self, row):
        return super().__getitem__(int(row))


def run(folder, head, *, cached, **settings):
    model = make_model(head=head, dropout=0.0, **settings)
    args = ETFTrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=16, learning_rate=1e-2, freeze="backbone",
        torch_threads=1,
    )  # fmt: skip
    train, validation, collator = Plain(COUNTS, 0), Plain((7, 7, 7), 1), collate
    if cached:
        train, validation = (cache_features(model, rows, collate, batch_size=16) for rows in (train, validation))
        collator = FeatureCollator(collate)
    trainer = ETFTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        labels=Labelled(COUNTS, 0).labels,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("head", "settings"),
    [("linear", {}), ("cosine", {}), ("etf", {"trainable": True})],
    ids=["linear", "cosine", "etf trained on"],
)
def test_the_run_is_the_one_that_reads_the_rows_each_time(head, settings, tmp_path):
    plain, cached = (run(tmp_path / str(kept), head, cached=kept, **settings) for kept in (False, True))
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(cached.model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    scores = [trainer.evaluate() for trainer in (plain, cached)]
    for name in ("eval_balanced_accuracy", "eval_loss"):
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-5)
    logged = [[entry for entry in trainer.state.log_history if "eval_nc1" in entry] for trainer in (plain, cached)]
    assert logged[0] and logged[0][-1]["eval_nc1"] == pytest.approx(logged[1][-1]["eval_nc1"], rel=1e-3)
    assert not any(parameter.requires_grad for name, parameter in cached.model.named_parameters() if "vit." in name)


def test_smoothed_labels_need_no_images(tmp_path):
    rows = cache_features(make_model(head="linear"), Plain(COUNTS, 0), collate)
    args = ETFTrainingArguments(
        str(tmp_path), num_train_epochs=1, freeze="backbone", eval_strategy="no", label_smoothing=0.1, torch_threads=1
    )
    trainer = ETFTrainer(make_model(head="linear"), args, train_dataset=rows, data_collator=FeatureCollator(collate),
                         labels=rows.labels)  # fmt: skip
    assert trainer.train().global_step > 0


def test_numbers_that_are_no_places_are_refused():
    def shifted(rows):
        batch = collate(rows)
        return {**batch, "row_id": batch["row_id"] + 1}

    with pytest.raises(ValueError, match="`row_id`"):
        cache_features(make_model(), Plain(COUNTS, 0), shifted)


@pytest.mark.parametrize("name", ["vit", "timm cnn", "bert"])
def test_a_model_scores_features_in_place_of_its_inputs(name):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = {
        "vit": make_model,
        "timm cnn": lambda: adapt(
            TimmWrapperForImageClassification(TimmWrapperConfig(architecture="regnetx_002", num_labels=10)), 3
        ),
        "bert": lambda: adapt(BertForSequenceClassification(BertConfig(**sizes, vocab_size=20)), 3),
    }[name]().eval()
    shape = {"vit": (4, 3, 8, 8), "timm cnn": (4, 3, 64, 64)}.get(name)
    batch = {"pixel_values": torch.randn(shape)} if shape else {"input_ids": torch.randint(1, 20, (4, 6))}
    labels = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        (features,) = read_features(model, batch)
        whole, from_features = model(**batch, labels=labels), model(features=features, labels=labels)
        assert torch.equal(read_features(model, {"features": features})[0], features)
    torch.testing.assert_close(from_features.logits, whole.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(from_features.loss, whole.loss, atol=1e-6, rtol=1e-5)


def test_rows_keep_their_places_and_views_come_in_turn():
    model = make_model(dropout=0.0)
    rows = Labelled(COUNTS, 0)
    cached = cache_features(model, rows, collate, views=2, batch_size=7)
    assert len(cached) == len(rows) and cached.features.shape[:2] == (2, len(rows))
    with torch.no_grad():
        for epoch in range(2):
            batch = collate([rows[RowDraw(row, epoch, row)] for row in (5, 40)])
            expected = read_features(model.eval(), {"pixel_values": batch["pixel_values"]})[0]
            for row, feature in zip((5, 40), expected, strict=True):
                torch.testing.assert_close(cached[RowDraw(row, epoch)]["features"], feature, atol=1e-6, rtol=1e-5)
                assert torch.equal(cached[RowDraw(row, epoch + 2)]["features"], cached[RowDraw(row, epoch)]["features"])
    assert not torch.equal(cached.features[0], cached.features[1])
    assert [cached[row]["labels"] for row in range(len(rows))] == rows.labels.tolist()
    draws = RowDraws(range(3))
    draws.set_epoch(1)
    assert all(torch.equal(cached[draw]["features"], cached.features[1, int(draw)]) for draw in draws)


def test_several_heads_and_no_views_are_refused():
    config = TimmWrapperConfig(architecture="levit_128s", num_labels=10)
    several = adapt(TimmWrapperForImageClassification(config), 3)
    assert len(head_modules(several)) > 1
    with pytest.raises(ValueError, match="heads"):
        cache_features(several, Plain(COUNTS, 0), collate)
    with pytest.raises(ValueError, match=r"`views` \(=0\)"):
        cache_features(make_model(), Plain(COUNTS, 0), collate, views=0)
    assert len(CachedFeatures(torch.zeros(1, 3, 2), np.zeros(3, np.int64))) == 3
