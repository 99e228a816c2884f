"""Laws of the models: stock to everyone else, our loss inside, and folders that two libraries read alike."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import warnings

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import (
    LABELS,
    MAKERS,
    NAMES,
    batch,
    bert,
    factory,
    finished,
    is_text,
    llama,
    logits,
    resnet,
    stock_bert,
    stock_vit,
    vit,
)
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ViTConfig,
)
from transformers.modeling_outputs import ImageClassifierOutput

from etf_adapt.heads.alignment import align_head
from etf_adapt.heads.in_model import batch_norms, head_modules
from etf_adapt.heads.layers import ETFHead, LinearHead
from etf_adapt.losses.dot_regression import margin_dot_regression_loss
from etf_adapt.losses.registry import make_loss
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt
from etf_adapt.models.swap import restore_head

# One class, two readings


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_is_of_its_stock_class_and_of_the_factory(name):
    model = MAKERS[name]()
    stock = type(model)._stock_class
    assert isinstance(model, stock) and isinstance(model, factory(name)) and type(model) is not stock
    other = ETFForImageClassification if is_text(name) else ETFForSequenceClassification
    assert not isinstance(model, other)
    assert (type(model).__name__, type(model).__qualname__) == (stock.__name__, stock.__qualname__)
    assert type(model).__module__ == stock.__module__
    assert type(model) is type(MAKERS[name]())
    assert model.accepts_loss_kwargs is False


def test_a_factory_is_not_instantiated():
    with pytest.raises(TypeError, match="from_pretrained"):
        ETFForImageClassification(ViTConfig())


def test_adapt_keeps_the_object_and_every_weight_but_the_head():
    stock = stock_vit()
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model = adapt(stock, 3)
    assert model is stock
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("classifier"))
    assert after["classifier.weight"].shape == (3, 16)


def test_adapt_refuses_what_is_no_model_of_transformers():
    with pytest.raises(TypeError, match=r"Linear.*swap_head"):
        adapt(torch.nn.Linear(2, 2), 3)


@pytest.mark.parametrize("head", ["etf", "linear", "cosine", "paper"])
def test_a_model_stays_on_its_device_whatever_the_default_is(head):
    stock = stock_vit()
    expected = adapt(copy.deepcopy(stock), 3, head=head).state_dict()
    with torch.device("meta"):
        found = adapt(stock, 3, head=head).state_dict()
        assert all(tensor.is_meta for tensor in vit(head=head).state_dict().values())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# Forward and loss


@pytest.mark.parametrize("name", MAKERS)
def test_the_loss_of_forward_is_that_of_its_logits(name):
    model, inputs = MAKERS[name](), batch(name)
    output = model(**inputs, labels=LABELS)
    assert next(iter(output)) == "loss"
    assert torch.equal(output.loss, margin_dot_regression_loss(output.logits, LABELS))
    assert torch.equal(output.logits, model(**inputs).logits) and model(**inputs).loss is None
    assert type(output) is type(model(**inputs))


def test_labels_are_read_by_position_by_name_as_tuple_and_as_probabilities():
    model, pixels = vit(), batch("vit")["pixel_values"]
    output = model(pixels, labels=LABELS)
    assert isinstance(output, ImageClassifierOutput)
    assert torch.equal(model(pixels, LABELS).loss, output.loss)
    loss, scores = model(pixels, labels=LABELS, return_dict=False)[:2]
    assert torch.equal(loss, output.loss) and torch.equal(scores, output.logits)
    assert len(model(pixels, return_dict=False)) == 1
    soft = torch.nn.functional.one_hot(LABELS, 3).float()
    assert torch.allclose(model(pixels, labels=soft).loss, output.loss)
    text, ids = bert(), batch("bert")["input_ids"]
    positional = text(ids, None, None, None, None, LABELS)
    assert torch.equal(positional.loss, text(input_ids=ids, labels=LABELS).loss)


def test_classes_without_a_loss_of_their_own_have_ours():
    config = transformers.LevitConfig(
        image_size=32, hidden_sizes=[8, 8, 8], num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[4, 4, 4]
    )
    model = adapt(transformers.LevitForImageClassificationWithTeacher(config).eval(), 3)
    assert len(head_modules(model)) == 2
    output = model(pixel_values=torch.randn(4, 3, 32, 32), labels=LABELS)
    assert torch.equal(output.loss, margin_dot_regression_loss(output.logits, LABELS))


@pytest.mark.parametrize(
    ("head", "loss", "counts"),
    [
        ("etf", {"name": "dot_regression", "form": "sphere", "label_smoothing": 0.1}, None),
        ("etf", {"name": "logit_adjusted", "tau": 0.5}, [9, 3, 1]),
        ("linear", None, None),
        ("cosine", None, None),
        ("paper", None, None),
    ],
)
def test_set_loss_is_make_loss(head, loss, counts):
    model, inputs = vit(head=head, loss=loss, class_counts=counts), batch("vit")
    settings = model.etf_settings
    output = model(**inputs, labels=LABELS)
    assert torch.equal(output.loss, make_loss(settings["loss"], class_counts=counts)(output.logits, LABELS))
    assert settings["loss"]["name"] == {"linear": "cross_entropy", "cosine": "cross_entropy"}.get(
        head, (loss or {}).get("name", "dot_regression")
    )


def test_vertices_that_cannot_all_be_reached_have_a_target_that_can():
    few, many = vit(loss="dot_regression"), adapt(stock_vit(), 101, loss="dot_regression")
    width = many.classifier.weight.shape[1]
    assert few.etf_settings["loss"] == {"name": "dot_regression"} and width < 100
    assert many.etf_settings["loss"] == {"name": "dot_regression", "target": (width / 100) ** 0.5}
    many.set_loss({"name": "dot_regression", "target": 1.0})
    assert many.etf_settings["loss"]["target"] == 1.0


def test_class_counts_are_checked():
    model = vit()
    with pytest.raises(ValueError, match=r"`class_counts` has 2 entries.*3 classes"):
        model.set_loss("logit_adjusted", class_counts=[1, 2])
    with pytest.raises(ValueError, match="class_counts"):
        model.set_loss("logit_adjusted")


def test_class_weights_are_checked_saved_and_read_back(tmp_path):
    model, inputs = vit(head="linear", class_counts=[9, 3, 1]), batch("vit")
    with pytest.raises(ValueError, match=r"`class_weights` has 2 entries.*3 classes"):
        vit(loss={"name": "cross_entropy", "class_weights": [1.0, 2.0]})
    for weights in ("balanced", torch.tensor([0.5, 1.0, 4.0])):
        model.set_loss({"name": "focal", "class_weights": weights})
        model.save_pretrained(tmp_path)
        again = ETFForImageClassification.from_pretrained(tmp_path)
        assert again.etf_settings["loss"] == model.etf_settings["loss"]
        assert torch.equal(again(**inputs, labels=LABELS).loss, model(**inputs, labels=LABELS).loss)


def test_gradients_reach_the_backbone_and_not_the_fixed_head():
    model = vit()
    model(**batch("vit"), labels=LABELS).loss.backward()
    assert model.classifier.weight.grad is None and not model.classifier.weight.requires_grad
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("classifier"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["vit", "resnet", "llama"])
def test_a_copy_is_the_same_model(name, copied):
    model, inputs = MAKERS[name](loss={"name": "dot_regression", "form": "one_sided"}), batch(name)
    model.set_calibration(3.0)
    twin = copied(model)
    assert type(twin) is type(model) and twin.etf_settings == model.etf_settings
    ours, theirs = model(**inputs, labels=LABELS), twin(**inputs, labels=LABELS)
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.logits, theirs.logits)
    assert not any(p.requires_grad for head in head_modules(twin).values() for p in head.parameters())
    head = next(iter(head_modules(twin).values()))
    head.set_class_vectors(torch.zeros_like(head.class_vectors()[0]))
    assert torch.equal(model(**inputs).logits, ours.logits)


def test_restore_head_gives_the_stock_model_and_its_loss_back():
    stock = stock_vit()
    inputs, labels = batch("vit"), torch.tensor([4, 0, 1, 3])
    before = stock(**inputs, labels=labels)
    model = restore_head(adapt(stock, 3, id2label=NAMES))
    after = model(**inputs, labels=labels)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert model.config.num_labels == 5 and model.config.id2label[4] == "LABEL_4"


# What would go wrong in silence


def test_a_random_frame_warns_at_its_first_training_forward_only():
    model, inputs = vit(), batch("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(**inputs, labels=LABELS)
    with pytest.warns(UserWarning, match="align_head"):
        model.train()(**inputs, labels=LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, labels=LABELS)
        linear = vit(head="linear").train()
        linear(**inputs, labels=LABELS)


def test_training_without_the_labels_is_said_once():
    model, inputs = vit(head="linear").train(), batch("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.compute_loss_from_logits(model(**inputs).logits, LABELS)
        model(**inputs)
    with pytest.warns(UserWarning, match="label_smoothing_factor") as said:
        for _ in range(4):
            model(**inputs)
    assert len(said) == 1


# Labels


def test_labels_are_named_as_everywhere_in_transformers(tmp_path):
    stock_vit().save_pretrained(tmp_path)

    def load(**settings):
        return ETFForImageClassification.from_pretrained(tmp_path, **settings).config

    assert load().num_labels == 5
    assert load(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    inverse = {name: index for index, name in NAMES.items()}
    for settings in (
        {"id2label": NAMES},
        {"label2id": inverse},
        {"num_labels": 3, "id2label": NAMES, "label2id": inverse},
        {"id2label": {"2": "cedar", "0": "ash", "1": "birch"}},
        {"id2label": [*NAMES.values()]},
    ):
        config = load(**settings)
        assert (config.num_labels, config.id2label, config.label2id) == (3, NAMES, inverse)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_labels": 4, "id2label": NAMES}, r"`num_labels` \(=4\) must be the number of names in `id2label` \(=3\)"),
        ({"num_labels": 1}, "at least 2"),
        ({"id2label": {0: "a", 2: "b"}}, "`id2label` must name the classes 0 to 1"),
        ({"num_labels": 3, "head": "liner"}, "liner"),
        ({"num_labels": 3, "head_path": "klassifier"}, "klassifier"),
        ({"num_classes": 3}, r"`num_classes` \(=3\) is `num_labels` here"),
        ({"id2label": ["a", "b"], "num_labels": 3}, r"`id2label` \(=2\)"),
        ({"num_labels": 3, "loss": "focul"}, "focal"),
        ({"num_labels": 3, "head": "paper", "trainable": True}, "trainable"),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path, settings, words):
    stock_vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        ETFForImageClassification.from_pretrained(tmp_path, **settings)


def test_a_model_of_the_other_task_is_refused(tmp_path):
    stock_vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'vit' model.*ETFForImageClassification"):
        ETFForSequenceClassification.from_pretrained(tmp_path)


def test_half_precision_files_are_loaded_as_float32_unless_asked_otherwise(tmp_path):
    stock_vit().to(torch.bfloat16).save_pretrained(tmp_path)
    assert ETFForImageClassification.from_pretrained(tmp_path).dtype == torch.float32
    half = ETFForImageClassification.from_pretrained(tmp_path, num_labels=3, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_seed_alone_decides_the_new_rows(tmp_path):
    stock_vit().save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    for head in ("etf", "linear", "cosine", "paper"):
        rows = []
        for seed in (1, 1, 2):
            model = ETFForImageClassification.from_pretrained(tmp_path, num_labels=3, head=head, seed=seed)
            rows.append(model.classifier.weight)
            assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
        torch.manual_seed(5)
        state = torch.random.get_rng_state()


# Calibration


@pytest.mark.parametrize("offsets", [None, [0.5, -1.0, 0.25]])
def test_the_logit_scale_scales_the_logits_and_leaves_the_loss(offsets):
    model, inputs = vit(), batch("vit")
    before = model(**inputs, labels=LABELS)
    model.set_calibration(7.0)  # replaced by the next
    model.set_calibration(3.0, offsets)
    after = model(**inputs, labels=LABELS)
    expected = 3.0 * before.logits + torch.tensor(offsets or [0.0])
    torch.testing.assert_close(after.logits, expected)
    torch.testing.assert_close(after.loss, before.loss)
    if offsets is None:
        assert torch.equal(after.logits.argmax(1), before.logits.argmax(1))
    model.set_calibration(1.0)
    torch.testing.assert_close(model(**inputs).logits, before.logits)


def test_wrong_calibrations_are_refused():
    model = vit()
    with pytest.raises(ValueError, match=r"`logit_scale` \(=0\.0\)"):
        model.set_calibration(0.0)
    with pytest.raises(ValueError, match=r"2 entries.*3 classes"):
        model.set_calibration(1.0, [0.0, 1.0])
    with pytest.raises(ValueError, match=r"no bias|has none"):
        llama().set_calibration(1.0, [0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="fold_heads"):
        vit(head="cosine").set_calibration(2.0)


# One folder, two readings


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A finished model of each kind, its folder and its logits."""
    root, made = tmp_path_factory.mktemp("folders"), {}
    for name in MAKERS:
        model = finished(name)
        model.save_pretrained(root / name)
        made[name] = (model, root / name, logits(model, batch(name)))
    return made


@pytest.mark.parametrize("name", MAKERS)
def test_the_folder_comes_back_here_in_full(folders, name):
    model, folder, expected = folders[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = factory(name).from_pretrained(folder)
    assert again.etf_settings == model.etf_settings
    assert again.etf_settings["logit_scale"] == 2.5 and again.etf_settings["head"]["frame"] == "means"
    assert type(again) is type(model) and not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    # Convolutions may add in another order where the memory of a tensor is aligned otherwise.
    torch.testing.assert_close(logits(again, batch(name)), expected, rtol=1e-5, atol=1e-5)
    losses = [each(**batch(name), labels=LABELS).loss for each in (model, again)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for head in head_modules(again).values():
        assert isinstance(head, ETFHead) and not any(p.requires_grad for p in head.parameters())
    assert again.config.id2label == NAMES
    assert (again.processor is None) == (name in ("resnet", "micro"))


@pytest.mark.parametrize("name", ["vit", "micro"])
def test_saving_what_was_loaded_changes_nothing(folders, name, tmp_path):
    _, folder, _ = folders[name]
    ETFForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())


def test_what_is_asked_for_by_name_overrides_what_was_saved(folders):
    _, folder, expected = folders["vit"]
    again = ETFForImageClassification.from_pretrained(
        folder, head="etf", trainable=True, loss="logit_adjusted", id2label=NAMES
    )
    assert again.classifier.weight.requires_grad and again.etf_settings["loss"] == {"name": "logit_adjusted"}
    assert again.etf_settings["class_counts"] == [9, 3, 1]
    assert torch.equal(logits(again, batch("vit")), expected)


@pytest.mark.parametrize("settings", [{"num_labels": 4}, {"head": "linear"}, {"id2label": {0: "x", 1: "y", 2: "z"}}])
@pytest.mark.parametrize("name", ["vit", "micro"])
def test_other_labels_or_another_head_give_a_new_head(folders, name, settings):
    _, folder, _ = folders[name]
    with pytest.warns(UserWarning, match=r"replaced by a new one"):
        again = ETFForImageClassification.from_pretrained(folder, **settings)
    found = again.etf_settings
    assert found["logit_scale"] == 1.0 and found["prior_adjustment"] is None and found["class_counts"] is None
    assert found["head"]["frame"] in ("random", "initialised")
    assert logits(again, batch(name)).shape == (4, settings.get("num_labels", 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_in_half_precision_is_no_changed_layer(folders, tmp_path, dtype):
    model, folder, _ = folders["vit"]
    half = ETFForImageClassification.from_pretrained(folder, dtype=dtype)
    half.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for again in (None, torch.float32, dtype):
            settings = {} if again is None else {"dtype": again}
            assert ETFForImageClassification.from_pretrained(tmp_path, **settings).etf_settings == model.etf_settings


# Heads that are no stock layer


@pytest.mark.parametrize("name", ["vit", "resnet", "bert"])
@pytest.mark.parametrize("head", ["cosine", "paper"])
def test_checkpoints_hold_the_live_head_and_other_folders_the_folded_one(name, head, tmp_path):
    model, inputs = MAKERS[name](head=head), batch(name)
    model.train()
    with torch.no_grad():
        for _ in range(3):  # moves the statistics of a BatchNorm
            model(**inputs)
    expected = logits(model, inputs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    live, finished = tmp_path / "checkpoint-7", tmp_path / "finished"
    model.save_pretrained(live)
    model.save_pretrained(finished)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    again = factory(name).from_pretrained(live)
    assert again.etf_settings == model.etf_settings
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.state_dict().items())
    assert torch.equal(logits(again, inputs), expected)
    auto = AutoModelForSequenceClassification if is_text(name) else AutoModelForImageClassification
    stock = auto.from_pretrained(finished)
    assert torch.equal(logits(stock, inputs).argmax(1), expected.argmax(1))
    with pytest.raises(ValueError, match="no stock class has this classifier; load it with etf_adapt"):
        auto.from_pretrained(live)
    folded = factory(name).from_pretrained(finished)
    layer = next(iter(head_modules(folded).values()))
    settings = folded.etf_settings
    assert isinstance(layer, LinearHead) and settings["head"]["folded"] and settings["head"]["kind"] == head
    assert layer.weight.requires_grad == (head == "cosine")
    assert torch.equal(logits(folded, inputs), logits(stock, inputs))
    assert folded(**inputs, labels=LABELS).loss.isfinite()
    model.fold_heads()
    torch.testing.assert_close(logits(model, inputs), logits(stock, inputs))


@pytest.mark.parametrize("head", ["cosine", "paper"])
def test_a_folded_folder_is_no_checkpoint_of_the_live_head(head, tmp_path):
    model = vit(head=head)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=f"another head.*{head}.*checkpoint-<step>"):
        model.load_state_dict(weights, strict=False)


# Folders that are not whole, or another model's


def test_missing_backbone_weights_are_named(tmp_path, caplog):
    stock_vit().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in weights if "attention.query.weight" in key or "q_proj.weight" in key)
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        ETFForImageClassification.from_pretrained(tmp_path, num_labels=3)
    finally:
        logger.removeHandler(caplog.handler)
    assert "q_proj.weight" in caplog.text


def test_a_part_of_the_weights_loads_nothing_and_is_named_at_the_next_forward():
    model, other = vit(), vit(seed=1)
    state = other.state_dict()
    names = [name for name in state if name.startswith("vit.")]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: state[name] for name in names[3:]}, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for call in (lambda: model(**batch("vit")), lambda: model.save_pretrained("never")):
        with pytest.raises(RuntimeError, match=names[0]):
            call()
    model.load_state_dict(state, strict=False)
    assert torch.equal(logits(model, batch("vit")), logits(other, batch("vit")))


def test_another_architectures_weights_are_refused():
    model = vit()
    with pytest.raises(RuntimeError):
        model.load_state_dict(stock_bert().state_dict(), strict=False)
        model(**batch("vit"))
    with pytest.raises(RuntimeError, match="bert"):
        model.load_state_dict(stock_bert().state_dict())


def test_strict_loading_names_what_is_missing():
    model = vit()
    state = model.state_dict()
    del state["vit.layernorm.weight"]
    with pytest.raises(RuntimeError, match=r"vit\.layernorm\.weight"):
        model.load_state_dict(state)


def test_the_head_alone_is_loaded():
    model, other = vit(), vit(seed=1)
    rows = {f"classifier.{name}": tensor for name, tensor in other.classifier.state_dict().items()}
    model.load_state_dict(rows, strict=False)
    assert torch.equal(model.classifier.weight, other.classifier.weight) and model.classifier.frame == "loaded"
    model(**batch("vit"))


@pytest.mark.parametrize("name", MAKERS)
def test_files_in_the_names_of_the_disk_are_loaded(folders, name):
    _, folder, expected = folders[name]
    other = MAKERS[name]()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter.data)
    switches = [parameter.requires_grad for parameter in other.parameters()]
    parameters = list(other.parameters())
    other.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert torch.equal(logits(other, batch(name)), expected)
    assert all(new is old for new, old in zip(other.parameters(), parameters))
    assert [parameter.requires_grad for parameter in other.parameters()] == switches


# Real backbones


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.hf", "vit_tiny_patch16_224.timm", "mobilenetv2_100.timm"])
def test_real_image_backbones_are_kept_and_come_back(shared_models, name, tmp_path):
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    folder = shared_models / name
    if name.endswith(".timm"):
        stock, prefix = timm.create_model(f"local-dir:{folder}", pretrained=True), "timm_model."
    else:
        stock, prefix = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32), ""
    model = ETFForImageClassification.from_pretrained(folder, id2label=NAMES)
    heads = tuple(head_modules(model))
    weights = {prefix + key: tensor for key, tensor in stock.state_dict().items()}
    backbone = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(heads)}
    assert all(torch.equal(tensor, weights[key]) for key, tensor in backbone.items())
    expected = logits(model, {"pixel_values": pixels})
    model.save_pretrained(tmp_path)
    again = ETFForImageClassification.from_pretrained(tmp_path)
    assert again.etf_settings == model.etf_settings
    assert torch.equal(logits(again, {"pixel_values": pixels}), expected)
    found = logits(AutoModelForImageClassification.from_pretrained(tmp_path), {"pixel_values": pixels})
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_real_text_encoder_without_a_classifier_gets_one_and_comes_back(minilm, tmp_path):
    model = ETFForSequenceClassification.from_pretrained(minilm, id2label=NAMES)
    inputs = dict(model.processor(["a tall ash", "two birches by the road"], padding=True, return_tensors="pt"))
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = ETFForSequenceClassification.from_pretrained(tmp_path)
    assert again.etf_settings == model.etf_settings and torch.equal(logits(again, inputs), expected)
    found = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert again.processor.get_vocab() == model.processor.get_vocab()


@pytest.mark.parametrize("head", ["etf", "linear"])
def test_batch_norm_stays_as_it_was_aligned_under_in_any_loop(head):
    model, inputs = resnet(head=head), batch("resnet")
    norms = batch_norms(model.train())
    assert norms and all(norm.training for norm in norms)  # a fresh head leaves them alone
    if head == "etf":
        align_head(model, [{**inputs, "labels": LABELS}])
    before = [norm.running_mean.clone() for norm in norms]
    model.train()(**inputs, labels=LABELS)
    is_kept = all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert model.training and is_kept is (head == "etf")
    model.freeze_batch_norm = False
    model.train()(**inputs, labels=LABELS)
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert not any(norm.training for norm in [*norms, model.eval()])
    model.without_dropout = True
    assert all(norm.training for norm in batch_norms(model.train())) and not model.timm_model.training


def test_the_prior_is_taken_out_of_half_precision_logits_in_full():
    model = resnet(head="linear")
    offsets = [0.012, -3.4, 2.7]
    model.set_calibration(1.0, offsets)
    logits = torch.tensor([[9.8, 1.0, -2.0]], dtype=torch.bfloat16)
    expected = torch.nn.functional.cross_entropy(logits.float() - torch.tensor(offsets), torch.tensor([0]))
    torch.testing.assert_close(model.compute_loss_from_logits(logits, torch.tensor([0])), expected)
