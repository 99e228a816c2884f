"""Laws of folders: stock tools read every kind without us, and what they save again is known for what it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import KINDS, NAMES, batch, factory, finished, is_text, logits, the_head
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    pipeline,
)

from etf_adapt.heads.in_model import head_modules
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt
from etf_adapt.models.swap import restore_head


def auto_class(name):
    return AutoModelForSequenceClassification if is_text(name) else AutoModelForImageClassification


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A finished model of each kind, and its folder."""
    root, made = tmp_path_factory.mktemp("folders"), {}
    for name in KINDS:
        made[name] = finished(name), root / name
        made[name][0].save_pretrained(root / name)
    return made


# Stock tools, without us

READER = """
import json, logging, sys, warnings
sys.modules["etf_adapt"] = None  # any import of it fails
import timm, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, pipeline
said, results = [], {}
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append(record.getMessage())
for name in ("transformers", "timm"):
    logging.getLogger(name).addHandler(handler)
warnings.showwarning = lambda message, *rest: said.append(str(message))
torch.set_num_threads(1)
for folder, is_text, is_timm, dtype in json.loads(sys.argv[1]):
    said.clear()
    auto = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
    model = auto.from_pretrained(folder).eval()
    kind = type(model)
    concrete = getattr(transformers, kind.__name__).from_pretrained(folder).eval()
    inputs = load_file(folder + "/inputs")
    with torch.no_grad():
        outputs = {"auto": model(**inputs).logits, "concrete": concrete(**inputs).logits}
        if is_timm:
            read = timm.create_model("local-dir:" + folder, pretrained=True).eval().to(model.dtype)
            outputs["timm"] = read(inputs["pixel_values"])
    pipe = pipeline("text-classification" if is_text else "image-classification", model=folder, top_k=3)
    [rows] = pipe(["a tree" if is_text else folder + "/image.png"])
    save_file(outputs, folder + "/outputs")
    results[folder] = {"class": kind.__name__, "dtype": str(model.dtype), "rows": rows, "said": list(said)}
print(json.dumps(results))
"""

STOCK_FORMS = {
    "whole": (torch.float32, {}),
    "shards": (torch.float32, {"max_shard_size": "8KB"}),
    "half": (torch.bfloat16, {}),
}
STOCK_CASES = [(name, form) for name in ("vit", "resnet", "bert", "llama") for form in STOCK_FORMS]


@pytest.fixture(scope="module")
def read_without_us(tmp_path_factory):
    """What a process that cannot import this library reads in the folders of each kind."""
    root, made, cases = tmp_path_factory.mktemp("read"), {}, []
    for name, form in STOCK_CASES:
        dtype, options = STOCK_FORMS[form]
        model, folder = finished(name).to(dtype), root / f"{name} {form}"
        model.save_pretrained(folder, **options)
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch(name).items()}
        save_file(inputs, folder / "inputs")
        Image.new("RGB", (40, 40), (200, 90, 10)).save(folder / "image.png")
        made[name, form] = model, folder, logits(model, inputs)
        cases.append([str(folder), is_text(name), name == "resnet", str(dtype)])
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    return {case: (*entry, results[str(entry[1])]) for case, entry in made.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), STOCK_CASES)
def test_stock_libraries_read_the_folder_without_us(read_without_us, name, form):
    model, folder, expected, result = read_without_us[name, form]
    outputs = load_file(folder / "outputs")
    assert set(outputs) == ({"auto", "concrete", "timm"} if name == "resnet" else {"auto", "concrete"})
    dtype = STOCK_FORMS[form][0]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for found in outputs.values():
        torch.testing.assert_close(found, expected, **tolerance)
    assert (result["class"], result["dtype"]) == (type(model)._stock_class.__name__, str(dtype))
    assert {row["label"] for row in result["rows"]} == set(NAMES.values())
    assert sum(row["score"] for row in result["rows"]) == pytest.approx(1.0, abs=1e-2 if form == "half" else 1e-4)
    assert not [line for line in result["said"] if re.search("weight|missing|unexpected|initiali|label|code", line)]
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.py"))
    assert (len(list(folder.glob("model-*"))) > 2) == (form == "shards" and name != "resnet")


# Stock tools that save the folder again


def by_auto(name, folder, out, change, **options):
    model = auto_class(name).from_pretrained(folder)
    change([model.get_submodule(path) for path in head_modules(finished(name))])
    model.save_pretrained(out, **options)


def by_timm(_, folder, out, change):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    change([model.get_classifier()])
    save_for_hf(model, str(out), safe_serialization=True)


def by_timm_with_its_config(name, folder, out, change):
    by_timm(name, folder, out, change)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    change([model.get_classifier()])
    save_for_hf(model, str(out), safe_serialization=True, model_config=json.loads((folder / "config.json").read_text()))


def by_sentence_transformers(_, folder, out, change):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    change([model[2].linear])
    model.save(str(out))


def by_file(_, folder, out, change):
    """Change the layer in the file itself."""
    shutil.copytree(folder, out)
    file = out / ("2_Dense/model.safetensors" if (out / "2_Dense").is_dir() else "model.safetensors")
    weights = load_file(file)
    keys = ("classifier.weight", "score.weight", "fc.weight", "linear.weight")
    layer = torch.nn.Linear(1, 1)
    layer.weight.data = weights[next(key for key in keys if key in weights)]
    change([layer])
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, file, metadata={"format": "pt"})


AGAIN = [
    *((name, "auto", by_auto, {}) for name in ("vit", "resnet", "bert", "llama")),
    *((name, "shards", by_auto, {"max_shard_size": "8KB"}) for name in ("vit", "resnet", "bert", "llama")),
    ("resnet", "timm", by_timm, {}),
    ("resnet", "timm and config", by_timm_with_its_config, {}),
    ("pooled", "sentence_transformers", by_sentence_transformers, {}),
    *((name, "file", by_file, {}) for name in KINDS),
]
CASES = [pytest.param(name, tool, options, id=f"{name} {kind}") for name, kind, tool, options in AGAIN]


@pytest.mark.parametrize(("name", "tool", "options"), CASES)
def test_what_a_stock_tool_saves_again_comes_back_in_full(folders, name, tool, options, tmp_path):
    model, folder = folders[name]
    tool(name, folder, tmp_path / "again", lambda layers: None, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = factory(name).from_pretrained(tmp_path / "again")
    assert again.etf_settings == model.etf_settings
    torch.testing.assert_close(logits(again, batch(name)), logits(model, batch(name)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def double(layers):
    for layer in layers:
        layer.weight *= 2


@pytest.mark.parametrize(("name", "tool", "options"), CASES)
def test_a_layer_that_a_stock_tool_changed_is_recognised(folders, name, tool, options, tmp_path):
    model, folder = folders[name]
    tool(name, folder, tmp_path / "theirs", double, **options)
    with pytest.warns(UserWarning, match="another tool has changed"):
        again = factory(name).from_pretrained(tmp_path / "theirs")
    settings = again.etf_settings
    assert settings["head"]["frame"] == "changed" and settings["logit_scale"] == 1.0
    assert torch.equal(the_head(again).weight, 2 * the_head(model).weight)
    assert not the_head(again).weight.requires_grad
    again.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert factory(name).from_pretrained(tmp_path / "ours").etf_settings == settings


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "resnet", "bert"])
def test_rounding_is_no_change_and_hides_none(folders, name, half, tmp_path):
    model, folder = folders[name]
    for place, change in (("same", lambda layers: None), ("changed", double)):
        stock = auto_class(name).from_pretrained(folder, dtype=half)
        change([stock.get_submodule(path) for path in head_modules(model)])
        stock.save_pretrained(tmp_path / place)
    for settings in ({}, {"dtype": "auto"}, {"dtype": half}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = factory(name).from_pretrained(tmp_path / "same", **settings)
        assert again.etf_settings == model.etf_settings
        with pytest.warns(UserWarning, match="another tool has changed"):
            changed = factory(name).from_pretrained(tmp_path / "changed", **settings)
        assert changed.etf_settings["logit_scale"] == 1.0


def test_timms_note_is_written_once_and_not_read_where_the_classifier_is_gone(folders, tmp_path):
    _, folder = folders["resnet"]
    ETFForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "twice")
    config = json.loads((tmp_path / "twice" / "config.json").read_text())
    [note] = config["pretrained_cfg"]["notes"]
    assert json.loads(note.removeprefix("etf_adapt: ")) == config["etf_adapt"]
    bare = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    save_for_hf(bare, str(tmp_path / "bare"), safe_serialization=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ETFForImageClassification.from_pretrained(tmp_path / "bare", num_labels=4)
    assert model.config.num_labels == 4 and model.etf_settings["logit_scale"] == 1.0
    restore_head(ETFForImageClassification.from_pretrained(folder)).save_pretrained(tmp_path / "restored")
    assert "etf_adapt" not in (tmp_path / "restored" / "config.json").read_text()


@pytest.mark.parametrize("tool", [AutoModel, AutoModelForSequenceClassification])
def test_an_encoder_that_was_saved_without_its_head_gets_a_new_one_and_says_so(folders, tool, tmp_path):
    _, folder = folders["pooled"]
    tool.from_pretrained(folder, transformers_weights=None).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"is replaced by a new one .*saved the encoder without it"):
        model = ETFForSequenceClassification.from_pretrained(tmp_path)
    settings = model.etf_settings
    assert (settings["pooling"], settings["head"]["frame"], settings["logit_scale"]) == ("mean", "random", 1.0)
    assert logits(model, batch("pooled")).shape == (4, 3)
    with pytest.warns(UserWarning, match="is replaced by a new one"):
        assert ETFForSequenceClassification.from_pretrained(tmp_path, num_labels=5).config.num_labels == 5


@pytest.mark.parametrize("mask", [0o022, 0o077])
@pytest.mark.parametrize("name", KINDS)
def test_weights_are_as_readable_as_other_files(name, mask, tmp_path):
    before = os.umask(mask)
    try:
        finished(name).save_pretrained(tmp_path, max_shard_size="8KB")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*") if file.is_file()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


# Real models, through all of it


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224.hf", "vit_tiny_patch16_224.timm", "mobilenetv2_100.timm", "minilm"]
)
def test_real_checkpoints_go_in_and_out(name, request, tmp_path):
    text = name == "minilm"
    source = request.getfixturevalue("minilm" if text else "shared_models")
    source = source if text else source / name
    ours = ETFForSequenceClassification if text else ETFForImageClassification
    auto = auto_class("bert" if text else "vit")
    pixels = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for pooling in ("mean", "stock") if text else (None,):
        model = ours.from_pretrained(source, id2label=NAMES, pooling=pooling)
        inputs = {"pixel_values": pixels}
        if text:
            inputs = dict(
                model.processor(["a tall ash", "birches", "a cedar", "two trees"], padding=True, return_tensors="pt")
            )
        for head in head_modules(model).values():
            head.set_class_vectors(
                torch.randn(head.class_vectors()[0].shape), torch.tensor([0.1, -0.2, 0.3]), frame="means"
            )
        model.set_calibration(2.5, [0.5, 0.0, -0.5])
        if name.endswith(".hf"):
            model.processor = AutoImageProcessor.from_pretrained(source)
        expected, folder = logits(model, inputs), tmp_path / f"out {pooling}"
        model.save_pretrained(folder)
        model.save_pretrained(tmp_path / f"shards {pooling}", max_shard_size="2MB")
        for place in (folder, tmp_path / f"shards {pooling}"):
            again = ours.from_pretrained(place)
            assert again.etf_settings == model.etf_settings and type(again) is type(model)
            torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-5, atol=1e-4)
            half = ours.from_pretrained(place, dtype=torch.bfloat16, device_map="auto")
            assert half.etf_settings == model.etf_settings and half.dtype == torch.bfloat16
            assert torch.equal(the_head(half).weight, the_head(model).weight.bfloat16())
            if pooling != "mean":
                torch.testing.assert_close(logits(auto.from_pretrained(place), inputs), expected, rtol=1e-5, atol=1e-4)
        if pooling == "mean":
            with pytest.raises(ValueError, match="no stock class has this classifier"):
                auto.from_pretrained(folder)
            encoder = AutoModel.from_pretrained(folder, transformers_weights=None).state_dict()
            assert all(torch.equal(tensor, encoder[key]) for key, tensor in model.encoder.state_dict().items())
        else:
            Image.new("RGB", (240, 240), (200, 90, 10)).save(tmp_path / "image.png")
            task = "text-classification" if text else "image-classification"
            [rows] = pipeline(task, model=str(folder), top_k=3)(["a tree" if text else str(tmp_path / "image.png")])
            assert {row["label"] for row in rows} == set(NAMES.values())
        if name.endswith(".timm"):
            read = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            torch.testing.assert_close(read(pixels), expected, rtol=1e-5, atol=1e-4)
            bare_file = tmp_path / "bare.safetensors"
            save_file(read.state_dict(), bare_file)
            bare = ours.from_pretrained(f"timm/{name.split('.')[0]}", num_labels=7, checkpoint_path=bare_file)
            found = bare.timm_model.forward_features(pixels)
            torch.testing.assert_close(found, read.forward_features(pixels), rtol=1e-5, atol=1e-4)
        if not text:
            old = timm.create_model(f"local-dir:{source}", pretrained=True).eval() if name.endswith(".timm") else None
            before = old(pixels) if old is not None else logits(auto.from_pretrained(source), inputs)
            swapped = [ours.from_pretrained(source, id2label=NAMES)]
            swapped += [] if old is not None else [adapt(auto.from_pretrained(source, dtype=torch.float32), 3)]
            for restored in map(restore_head, swapped):
                torch.testing.assert_close(logits(restored, inputs), before, rtol=1e-5, atol=1e-4)
                assert restored.config.num_labels == 1000
