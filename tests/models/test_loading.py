"""Laws of loading: what any name of a model leads to, and what is not passed over in silence on the way."""

from __future__ import annotations

import json
import warnings

import pytest
import timm
import torch
from safetensors.torch import save
from slow_cases import rest_slow
from small_models import LABELS, batch, finished, logits, save_tokenizer
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from etf_adapt import finetune, load_data, predict
from etf_adapt.heads.in_model import head_modules
from etf_adapt.inference.predictions import load_stock
from etf_adapt.inference.rows import prepare_rows
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt
from etf_adapt.models.folders import load_processor, locate
from etf_adapt.models.swap import restore_head

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TIMM = "timm/test_resnet.r160_in1k"


def stock_vit(num_labels=3):
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=num_labels)).eval()


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def timm_export(tmp_path):
    """A function that makes a folder as timm itself writes it, and returns it with its model."""

    def export(num_classes=4, **model_args):
        model = timm.create_model("test_vit", num_classes=num_classes, **model_args).eval()
        save_for_hf(model, str(tmp_path / "export"), safe_serialization=True)
        return tmp_path / "export", model

    return export


# Names


@pytest.mark.parametrize("name", ["resnet50", "timm/resnet50", "timm/resnet50.a1_in1k", "resnet50.a1_in1k"])
def test_a_timm_name_leads_to_its_weights_on_the_hub(name):
    assert locate(name, fetch=False) == "timm/resnet50.a1_in1k"


@pytest.mark.parametrize("name", ["cspnext_tiny", "timm/cspnext_tiny", "timm/cspnext_tiny.rsb_a1_in1k"])
def test_weights_that_lie_elsewhere_are_fetched_by_timm(hub, online, name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert locate(name, fetch=True) == "timm/cspnext_tiny.rsb_a1_in1k"
    torch.manual_seed(3)
    stock = timm.create_model("cspnext_tiny")
    hub.seed("munehiro-k/cspnext_tiny.rsb_a1_in1k", {"model.safetensors": save(stock.state_dict())})
    model = ETFForImageClassification.from_pretrained(name, num_labels=3)
    found = model.timm_model.state_dict()
    backbone = {key: value for key, value in stock.state_dict().items() if not key.startswith("head.fc.")}
    assert backbone and all(torch.equal(found[key], value) for key, value in backbone.items())


def test_weights_that_timm_cannot_fetch_are_never_replaced_by_random_ones():
    with pytest.raises(OSError, match=r"'timm/cspnext_tiny.rsb_a1_in1k'.*timm could not fetch its weights"):
        ETFForImageClassification.from_pretrained("cspnext_tiny", num_labels=3)


def test_a_model_that_timm_builds_otherwise_for_weights_is_built_so(tmp_path):
    model = ETFForImageClassification.from_pretrained("timm/fbnetc_100", num_labels=3, pretrained=False)
    assert {norm.eps for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d)} == {1e-3}
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(read(pixels), model(pixels).logits)


def test_a_folder_stands_before_a_timm_name(tmp_path, monkeypatch):
    stock_vit().save_pretrained(tmp_path / "resnet34")
    monkeypatch.chdir(tmp_path)
    assert isinstance(ETFForImageClassification.from_pretrained("resnet34"), ViTForImageClassification)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("timm/vit_smol", ValueError, "vit_smol"),
        ("timm/test_vit.no_such_tag", ValueError, "no_such_tag"),
        ("vit_bse", ValueError, "vit_base"),
        ("./no/such/folder", FileNotFoundError, "no/such/folder"),
    ],
)
def test_an_unknown_name_is_refused_by_name(name, error, words):
    with pytest.raises(error, match=words):
        ETFForImageClassification.from_pretrained(name, num_labels=3, pretrained=False)


@pytest.mark.parametrize("name", ["google/vit-base-patch16-224", "timm/resnet50.a1_in1k"])
def test_what_cannot_be_fetched_is_never_replaced_by_random_weights(name):
    with pytest.raises(OSError, match="could not be fetched"):
        ETFForImageClassification.from_pretrained(name, num_labels=3)


def test_random_weights_are_drawn_as_timm_draws_them_and_by_the_seed():
    loaded = (
        ETFForImageClassification.from_pretrained(TIMM, num_labels=3, pretrained=False, seed=s) for s in (0, 0, 1)
    )
    weights = [model.timm_model.conv1[0].weight.detach() for model in loaded]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    spread = timm.create_model("test_resnet").conv1[0].weight.detach().std()
    assert float(weights[0].std()) == pytest.approx(float(spread), rel=0.3)  # transformers' wrapper would make it 0.02


@pytest.fixture
def two_revisions(hub, online, tmp_path, monkeypatch):
    """A model and a timm model on the Hub, each with other weights and, of the latter, another mean on the branch v2."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folders = {}
    for branch in ("main", "v2"):
        torch.manual_seed(len(folders))
        folders["me/vit", branch], folders[TIMM, branch] = tmp_path / f"vit-{branch}", tmp_path / f"timm-{branch}"
        stock_vit().save_pretrained(folders["me/vit", branch])
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folders["me/vit", branch])
        net = timm.create_model("test_resnet", num_classes=3)
        net.pretrained_cfg["mean"] = (0.5, 0.5, 0.1 if branch == "v2" else 0.9)
        save_for_hf(net, str(folders[TIMM, branch]), safe_serialization=True)
    for (name, branch), folder in sorted(folders.items()):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        if branch == "main":
            hub.seed(name, files)
        else:
            second = hub.seed("other", files).at("main")
            hub.repositories[name].add(branch, "other weights", second.files, second.changed)
    return folders


@pytest.mark.parametrize("name", rest_slow(["me/vit", TIMM], fast=1))
def test_a_revision_of_a_model_is_the_one_that_is_read_also_offline(hub, two_revisions, name, monkeypatch):
    images = load_data("digits").test["image"][:3]
    for revision in (None, "v2"):
        expected = [*predict(two_revisions[name, revision or "main"], images, probabilities=True)]
        assert [*predict(name, images, probabilities=True, revision=revision)] == expected
        model = ETFForImageClassification.from_pretrained(name, num_labels=10, revision=revision)
        other = ETFForImageClassification.from_pretrained(two_revisions[name, revision or "main"], num_labels=10)
        torch.testing.assert_close(model.state_dict(), other.state_dict(), atol=0, rtol=0)
        rows = [prepare_rows(made, name, load_data("digits")).test[0]["pixel_values"] for made in (model, other)]
        assert torch.equal(*rows)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert [*predict(name, images, probabilities=True, revision="v2")] == expected and len(hub.requests) == before


def test_a_run_begins_from_the_revision(two_revisions, tmp_path):
    settings = {"num_train_epochs": 0, "max_train_rows": 60, "evaluate_test": False}
    made = finetune("me/vit", model_revision="v2", output_dir=str(tmp_path / "run"), **settings).model
    expected = AutoModelForImageClassification.from_pretrained(two_revisions["me/vit", "v2"]).vit.state_dict()
    torch.testing.assert_close(made.vit.state_dict(), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("me/vit", "v9", r"`model` \(='me/vit', revision 'v9'\): the Hub has no such model"),
        ("me/vit@v2", None, "Give the revision apart"),
        (f"{TIMM}@v2", None, "Give the revision apart"),
        ("cspnext_tiny", "v2", r"`revision` \(='v2'\): 'timm/cspnext_tiny.rsb_a1_in1k' is read from no Hub repository"),
    ],
)
def test_a_revision_that_is_not_there_is_refused_in_one_message(two_revisions, name, revision, words):
    with pytest.raises(ValueError, match=words):
        predict(name, [], revision=revision)
    with pytest.raises(ValueError, match=words):
        ETFForImageClassification.from_pretrained(name, num_labels=3, revision=revision)
    with pytest.raises(ValueError, match=words):
        finetune(name, model_revision=revision)


def test_a_folder_has_no_revision():
    with pytest.raises(ValueError, match=r"`revision` \(='v2'\): .*micro' is read from no Hub repository"):
        predict("micro", [], revision="v2")


# timm's folders


@pytest.mark.parametrize("model_args", [{}, {"img_size": 64}])
def test_what_timm_exports_is_loaded_exactly(timm_export, model_args):
    folder, stock = timm_export(**model_args)
    assert "num_classes" in read_config(folder)["model_args"]  # transformers' wrapper cannot be given it twice
    model = ETFForImageClassification.from_pretrained(folder)
    weights = {name.removeprefix("timm_model."): tensor for name, tensor in model.state_dict().items()}
    backbone = {name: tensor for name, tensor in stock.state_dict().items() if not name.startswith("head.")}
    assert model.config.num_labels == 4 and all(torch.equal(weights[name], backbone[name]) for name in backbone)


def test_a_timm_export_goes_round_through_us(timm_export, tmp_path):
    folder, _ = timm_export(img_size=64)
    model = ETFForImageClassification.from_pretrained(folder, id2label={0: "ash", 1: "birch", 2: "ash"})
    model.save_pretrained(tmp_path)
    before, config = read_config(folder), read_config(tmp_path)
    assert config["label_names"] == ["ash", "birch", "ash"] and "label_descriptions" not in config
    for name in ("mean", "std", "crop_pct", "interpolation", "input_size"):
        assert config["pretrained_cfg"][name] == before["pretrained_cfg"][name]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"config.json", "model.safetensors"}
    pixels = torch.randn(2, 3, 64, 64)
    read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(read(pixels), model(pixels).logits)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label[1] == "birch"


def test_a_backbone_without_classes_gets_as_many_as_are_asked_for(timm_export):
    folder, stock = timm_export(num_classes=0)
    with pytest.raises(ValueError, match=r"`num_labels` .=None.*without classes"):
        ETFForImageClassification.from_pretrained(folder)
    model = ETFForImageClassification.from_pretrained(folder, num_labels=3)
    pixels = torch.randn(2, 3, 160, 160)
    assert model(pixels).logits.shape == (2, 3)
    torch.testing.assert_close(model.timm_model.forward_features(pixels), stock.forward_features(pixels))


def test_several_heads_come_back(tmp_path):
    model = ETFForImageClassification.from_pretrained("timm/levit_128s.fb_dist_in1k", num_labels=3, pretrained=False)
    for number, head in enumerate(head_modules(model).values()):
        head.set_class_vectors(
            torch.randn(3, head.weight.shape[1]), torch.tensor([0.0, 1.0, float(number)]), frame="means"
        )
    model.set_calibration(2.0)
    model.save_pretrained(tmp_path)
    again = ETFForImageClassification.from_pretrained(tmp_path)
    assert len(head_modules(again)) == 2 and again.etf_settings == model.etf_settings
    found = again.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


# What comes back, and what does not


@pytest.mark.parametrize("name", ["vit", "micro"])
def test_a_model_is_saved_over_the_folder_that_it_was_loaded_from(name, tmp_path):
    first = adapt(stock_vit(), 3) if name == "vit" else ETFForImageClassification.from_pretrained(name, num_labels=3)
    first.save_pretrained(tmp_path)
    model = ETFForImageClassification.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    expected = first.state_dict()
    for state in (model.state_dict(), ETFForImageClassification.from_pretrained(tmp_path).state_dict()):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


def test_shards_and_one_file_saved_over_each_other_are_not_mixed_up(tmp_path):
    first, second = adapt(stock_vit(), 3), adapt(stock_vit(), 3)
    for model, size in ((first, "50GB"), (second, "5KB"), (first, "50GB")):
        model.save_pretrained(tmp_path, max_shard_size=size)
        for read in (ETFForImageClassification, AutoModelForImageClassification):
            found = read.from_pretrained(tmp_path).state_dict()
            assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_timms_layout_over_shards_leaves_none(tmp_path):
    adapt(stock_vit(), 3).save_pretrained(tmp_path, max_shard_size="5KB")
    model = ETFForImageClassification.from_pretrained(TIMM, num_labels=3, pretrained=False)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    found = ETFForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_a_model_with_its_old_head_leaves_no_entry(tmp_path):
    restore_head(adapt(stock_vit(5), 3)).save_pretrained(tmp_path)
    assert read_config(tmp_path).get("etf_adapt") is None
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.num_labels == 5


@pytest.mark.parametrize("head", ["cosine", "paper"])
def test_a_new_head_after_one_without_a_bias_has_the_stock_layers_bias(head):
    model = adapt(adapt(stock_vit(), 3, head=head), 4)
    assert model.classifier.bias is not None and model.state_dict().keys() == stock_vit(4).state_dict().keys()


def test_an_entry_of_a_newer_version_is_refused(tmp_path):
    adapt(stock_vit(), 3).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    config["etf_adapt"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="newer etf_adapt"):
        ETFForImageClassification.from_pretrained(tmp_path)


def test_a_stock_tool_that_gave_the_folder_other_classes_is_recognised(tmp_path):
    model = adapt(stock_vit(), 3, loss="logit_adjusted", class_counts=[5, 3, 1])
    model.save_pretrained(tmp_path / "ours")
    stock = AutoModelForImageClassification.from_pretrained(
        tmp_path / "ours", num_labels=4, ignore_mismatched_sizes=True
    )
    stock.save_pretrained(tmp_path / "theirs")
    with (
        pytest.warns(UserWarning, match="another tool has changed"),
        pytest.warns(UserWarning, match=r"logit_adjusted.*default loss: `class_counts`"),
    ):
        again = ETFForImageClassification.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again.classifier.weight, stock.classifier.weight)
    assert again.etf_settings["class_counts"] is None and again.etf_settings["loss"] == {
        "name": "margin_dot_regression"
    }


def test_a_model_spread_over_devices_is_refused(tmp_path):
    stock_vit().save_pretrained(tmp_path)
    assert ETFForImageClassification.from_pretrained(tmp_path, num_labels=4, device_map="cpu").config.num_labels == 4
    spread = {"vit": "cpu", "classifier": "disk"}
    with pytest.raises(ValueError, match="one device"):
        ETFForImageClassification.from_pretrained(
            tmp_path, num_labels=4, device_map=spread, offload_folder=tmp_path / "offload"
        )


UNKNOWN_LOSSES = {
    "no loss of this name": {"name": "of_old", "width": 3},
    "no option of this name": {"name": "margin_dot_regression", "margin": 0.5, "of_old": 3},
    "no such value": {"name": "dot_regression", "form": "of_old"},
    "class weights": {"name": "margin_dot_regression", "class_weights": "effective_number"},
}


@pytest.mark.parametrize("case", UNKNOWN_LOSSES)
def test_a_loss_that_this_version_lacks_is_the_default_with_one_warning(case, tmp_path):
    settings = UNKNOWN_LOSSES[case]
    model, inputs = finished("vit"), batch("vit")
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    config["etf_adapt"]["loss"] = settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=rf"{settings['name']}.*default loss") as warned:
        again = ETFForImageClassification.from_pretrained(tmp_path)
    assert len(warned) == 1 and torch.equal(logits(again, inputs), logits(model, inputs))
    found = again.etf_settings
    assert found["loss"] == {"name": "margin_dot_regression"}
    assert found["logit_scale"] == 2.5 and found["head"] == model.etf_settings["head"]
    assert again(**inputs, labels=LABELS).loss.isfinite()
    again.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ETFForImageClassification.from_pretrained(tmp_path / "saved").etf_settings == found


# Processors


def test_timms_data_configuration_is_that_of_its_image_processor():
    stock = AutoImageProcessor.from_pretrained(locate("micro", fetch=False)).data_config
    expected = {name: tuple(value) if isinstance(value, list) else value for name, value in stock.items()}
    assert load_processor("micro", "image") == expected


def test_a_processor_beside_the_model_goes_with_it(tmp_path):
    stock_vit().save_pretrained(tmp_path / "before")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "before")
    model = ETFForImageClassification.from_pretrained(tmp_path / "before", num_labels=4)
    model.save_pretrained(tmp_path / "after")
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert load_processor(tmp_path / "after", "image").size == {"height": 8, "width": 8}
    assert not (tmp_path / "checkpoint-1" / "preprocessor_config.json").exists()  # Trainer writes its own there


def test_a_tokenizer_without_words_is_none(tmp_path):
    BertForSequenceClassification(BertConfig(**SIZES, vocab_size=8)).save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)("a tree").input_ids) == 4  # made up: [CLS] [UNK] [UNK] [SEP]
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .*empty vocabulary"):
        load_processor(tmp_path, "text")
    model = ETFForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    model.save_pretrained(tmp_path / "saved")
    assert model.processor is None and not list((tmp_path / "saved").glob("*token*"))


def test_a_decoders_padding_token_comes_from_its_tokenizer(tmp_path):
    config = LlamaConfig(**SIZES, vocab_size=8, num_key_value_heads=2)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="pad_token_id"):
        model = ETFForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.config.pad_token_id is None and model.processor is None
    for tokens, expected in (({"eos_token": "</s>"}, 1), ({"eos_token": "</s>", "pad_token": "[PAD]"}, 2)):
        save_tokenizer(tmp_path, **tokens)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = ETFForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        assert model.config.pad_token_id == model.processor.pad_token_id == expected
        ids = torch.tensor([[3, 3, 3], [3, expected, expected]])
        alone = model(input_ids=ids[1:, :1]).logits
        torch.testing.assert_close(model(input_ids=ids).logits[1:], alone)
    model.save_pretrained(tmp_path / "saved")
    assert read_config(tmp_path / "saved")["pad_token_id"] == 2
    assert load_processor(tmp_path / "saved", "text").pad_token == "[PAD]"


CODE = """
from transformers import BertConfig, BertForSequenceClassification


class OwnConfig(BertConfig):
    model_type = "own"


class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    BertForSequenceClassification(BertConfig(**SIZES, vocab_size=9, num_labels=3)).save_pretrained(tmp_path / "own")
    config = read_config(tmp_path / "own") | {"model_type": "own", "architectures": ["OwnForSequenceClassification"]}
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnForSequenceClassification"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | {"auto_map": places}))
    (tmp_path / "own" / "own.py").write_text(CODE)
    model = ETFForSequenceClassification.from_pretrained(tmp_path / "own", num_labels=3, trust_remote_code=True)
    assert type(model).__name__ == "OwnForSequenceClassification" and model.etf_settings["head"]["kind"] == "etf"
    model.save_pretrained(tmp_path / "saved")  # as `finish` reads it
    stock = load_stock(tmp_path / "saved", "text", trust_remote_code=model.trusts_code)
    assert type(stock).__name__ == "OwnForSequenceClassification" and torch.equal(
        stock.classifier.weight, model.classifier.weight
    )


# What the stock class says


def test_loading_info_is_that_of_the_stock_class(tmp_path):
    stock_vit().vit.save_pretrained(tmp_path / "backbone")
    _, expected = ViTForImageClassification.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    folder = {"pretrained_model_name_or_path": tmp_path / "backbone"}  # by the name that it has in transformers
    model, info = ETFForImageClassification.from_pretrained(**folder, num_labels=3, output_loading_info=True)
    assert info == expected and {"classifier.weight", "classifier.bias"} <= info["missing_keys"]
    model.save_pretrained(tmp_path / "saved")
    again, info = ETFForImageClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert again.etf_settings == model.etf_settings and not any(info.values())
    with pytest.raises(ValueError, match="output_loading_info"):
        ETFForImageClassification.from_pretrained(TIMM, num_labels=3, pretrained=False, output_loading_info=True)
