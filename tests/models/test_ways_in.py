"""Laws of loading: the head is exact whatever the precision, the placing, the shards, the quantization and the repository."""

from __future__ import annotations

import hashlib
import inspect
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from small_models import KINDS, LABELS, NAMES, SIZES, batch, factory, finished, logits, stock_bert, stock_vit, the_head
from transformers import AutoModelForImageClassification, BitsAndBytesConfig, QuantoConfig

from etf_adapt.heads.in_model import HeadError
from etf_adapt.models.adapters import add_adapters
from etf_adapt.models.auto import ETFForImageClassification
from etf_adapt.models.folders import load_processor
from etf_adapt.models.quantization import spare_heads

HALF = torch.bfloat16


def load(name, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return factory(name).from_pretrained(folder, **options)


def same_head(model, other, dtype=torch.float32):
    one, two = the_head(model), the_head(other)
    assert one.weight.dtype == dtype and type(one.weight) is torch.nn.Parameter
    assert (one.bias is None) == (two.bias is None)
    return all(torch.equal(a, b.to(dtype)) for a, b in zip(one.parameters(), two.parameters()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished model of each kind, its folder, and the same in shards where the layout has them."""
    root, made = tmp_path_factory.mktemp("saved"), {}
    for name in KINDS:
        model = finished(name)
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"{name} in shards", max_shard_size="8KB")
        made[name] = model, root / name, root / f"{name} in shards"
    return made


# Precision and place

OPTIONS = {
    "nothing": ({}, torch.float32),
    "bfloat16": ({"dtype": torch.bfloat16}, torch.bfloat16),
    "float16 by name": ({"dtype": "float16"}, torch.float16),
    "the old name": ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
    "auto": ({"dtype": "auto"}, torch.float32),
    "one device": ({"device_map": "cpu"}, torch.float32),
    "any device": ({"device_map": "auto", "dtype": torch.bfloat16}, torch.bfloat16),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_the_head_is_that_which_was_saved(saved, name, option):
    model, *folders = saved[name]
    settings, dtype = OPTIONS[option]
    for folder in folders:
        again = load(name, folder, **settings)
        assert same_head(again, model, dtype) and {tensor.dtype for tensor in again.parameters()} == {dtype}
        assert again.etf_settings == model.etf_settings
    sharded = len(list(folders[1].glob("model-*.safetensors")))
    assert (sharded > 2) == (name in ("vit", "bert", "llama")), "the other layouts have one file"
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch(name).items()}
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 1.0}
    torch.testing.assert_close(logits(again, inputs).float(), logits(model, batch(name)), **tolerance)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_new_head_is_the_frame_whatever_the_file_holds(name, tmp_path):
    stock = {"vit": stock_vit, "bert": stock_bert}[name]()
    stock.save_pretrained(tmp_path / "whole")
    stock.to(HALF).save_pretrained(tmp_path / "half", max_shard_size="8KB")
    frame = load(name, tmp_path / "whole", num_labels=4)
    for settings, dtype in [
        ({}, torch.float32),
        ({"dtype": "auto"}, HALF),
        ({"dtype": HALF, "device_map": "auto"}, HALF),
    ]:
        again = load(name, tmp_path / "half", num_labels=4, **settings)
        assert same_head(again, frame, dtype) and {tensor.dtype for tensor in again.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16"])
@pytest.mark.parametrize("head", ["cosine", "etf", "paper"])
@pytest.mark.parametrize("name", ["vit", "resnet", "pooled"])
def test_a_training_checkpoint_is_loaded_in_any_precision(name, head, dtype, tmp_path):
    model = KINDS[name](head=head, seed=4)  # another frame than that of a new head
    model.save_pretrained(tmp_path / "checkpoint-7")
    again = load(name, tmp_path / "checkpoint-7", **({} if dtype is None else {"dtype": dtype}))
    expected = HALF if dtype == "bfloat16" else torch.float32
    assert same_head(again, model, expected) and {tensor.dtype for tensor in again.parameters()} == {expected}
    assert again.etf_settings == model.etf_settings


# Quantized backbones


def quantizations():
    yield "8 bit", "bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)
    yield "4 bit", "bitsandbytes", lambda: {"load_in_4bit": True}
    yield "int8", "torchao", lambda: transformers.TorchAoConfig(_int8())


def _int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


QUANTIZED = [
    pytest.param(make, id=name, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}"))
    for name, package, make in quantizations()
]
PATHS = {"vit": "classifier", "resnet": "timm_model.fc", "bert": "classifier", "llama": "score"}


def is_quantized(layer):
    weight = layer.weight
    return not weight.is_floating_point() or type(weight) not in (torch.nn.Parameter, torch.Tensor)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Models whose layers are wide enough for four bits on the CPU, and their folders."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for size in ("hidden_size", "intermediate_size"):
            patch.setitem(SIZES, size, 64)
        for name in ("vit", "bert", "llama", "pooled"):
            made[name] = finished(name), tmp_path_factory.mktemp(name)
            made[name][0].save_pretrained(made[name][1])
    return made


@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("name", ["vit", "bert", "llama", "pooled"])
def test_a_quantized_backbone_has_an_exact_head(wide, name, quantization, tmp_path):
    model, folder = wide[name]
    again = load(name, folder, quantization_config=quantization())
    assert same_head(again, model) and again.etf_settings == model.etf_settings
    assert sum(is_quantized(module) for module in again.modules() if isinstance(module, torch.nn.Linear)) > 3
    before = logits(again, batch(name))
    assert torch.nn.functional.cosine_similarity(before, logits(model, batch(name))).min() > 0.8
    again.save_pretrained(tmp_path)
    back = load(name, tmp_path)
    assert same_head(back, model) and torch.equal(logits(back, batch(name)), before)


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_quantized_timm_backbone_goes_round(quantization, tmp_path):
    name = "timm/test_vit.r160_in1k"
    model = ETFForImageClassification.from_pretrained(name, id2label=NAMES, pretrained=False, seed=1)
    model.save_pretrained(tmp_path / "whole")
    again = load("vit", tmp_path / "whole", quantization_config=quantization())
    pixels = {"pixel_values": torch.randn(2, 3, 160, 160)}
    assert same_head(again, model) and is_quantized(again.timm_model.blocks[0].attn.qkv)
    again.save_pretrained(tmp_path / "quantized")
    back = load("vit", tmp_path / "quantized")
    assert same_head(back, model) and torch.equal(logits(back, pixels), logits(again, pixels))


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_masters_beside_a_quantized_backbone_are_float32_unless_told(quantization, tmp_path):
    stock_bert().to(HALF).save_pretrained(tmp_path)
    frame = load("bert", tmp_path, num_labels=4)
    for settings, dtype in [({}, torch.float32), ({"dtype": HALF}, HALF)]:
        again = load("bert", tmp_path, num_labels=4, quantization_config=quantization(), **settings)
        assert same_head(again, frame, dtype) and again.bert.embeddings.LayerNorm.weight.dtype == dtype
    pytest.importorskip("peft", reason="needs peft")
    again = load("bert", tmp_path, num_labels=4, quantization_config=quantization(), head="linear")
    assert "classifier" not in add_adapters(again, {"peft_type": "LORA", "r": 2})
    again.train()(**batch("bert"), labels=LABELS).loss.backward()
    assert all(tensor.grad is not None for tensor in again.parameters() if tensor.requires_grad)


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_head_that_a_stock_tool_quantized_is_refused_by_name(wide, quantization, tmp_path):
    _, folder = wide["vit"]
    AutoModelForImageClassification.from_pretrained(folder, quantization_config=quantization()).save_pretrained(
        tmp_path
    )
    with pytest.raises(HeadError, match=r"`classifier` .*quantized"):
        load("vit", tmp_path)


@pytest.mark.parametrize("name", PATHS)
def test_the_head_is_added_to_what_a_quantization_spares(saved, name):
    model, _, _ = saved[name]
    auto = factory(name)._auto_model
    given = QuantoConfig(weights="int8", modules_to_not_convert=["mine"])
    assert spare_heads(given, auto, model.config).modules_to_not_convert == ["mine", PATHS[name]]
    assert given.modules_to_not_convert == ["mine"]
    usual = spare_heads({"load_in_8bit": True}, auto, model.config).llm_int8_skip_modules
    assert usual[-1] == PATHS[name] and len(usual) > 1
    named = spare_heads(given, auto, model.config, head_path=PATHS[name])
    assert named.modules_to_not_convert == ["mine", PATHS[name]]


# Repositories


def publish(cache, repository, revisions):
    """Lay folders into a cache as the Hub's client does: a commit each, and the name of its branch."""
    root = Path(cache, "models--" + repository.replace("/", "--"))
    for branch, folder in revisions.items():
        commit = hashlib.sha1(branch.encode()).hexdigest()
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / branch).write_text(commit)
        shutil.copytree(folder, root / "snapshots" / commit)


@pytest.fixture(scope="module")
def repositories(saved, tmp_path_factory):
    """Repositories me/<kind> with two branches, the model at the top and in the folder sub/deep; and the model of each."""
    root, cache = tmp_path_factory.mktemp("repositories"), tmp_path_factory.mktemp("cache")
    models = {}
    for name in KINDS:
        models[name] = {}
        for seed, branch in enumerate(["main", "second"], start=1):
            top, deep = finished(name, seed=seed), finished(name, seed=seed + 10)
            top.save_pretrained(root / name / branch)
            deep.save_pretrained(root / name / branch / "sub" / "deep")
            models[name][branch] = top, deep
        for place in (cache, constants.HF_HUB_CACHE):
            publish(place, f"me/{name}", {branch: root / name / branch for branch in models[name]})
    return models, cache, root


@pytest.mark.parametrize("options", [{}, {"revision": "second"}, {"revision": "second", "local_files_only": True}])
@pytest.mark.parametrize("name", KINDS)
def test_revision_and_subfolder_are_those_that_were_asked_for(repositories, name, options):
    models, cache, _ = repositories
    for position, place in enumerate([{}, {"subfolder": "sub/deep"}]):
        expected = models[name][options.get("revision", "main")][position]
        for where in ({}, {"cache_dir": cache}) if not options else ({},):
            again = load(name, f"me/{name}", **options, **place, **where)
            assert same_head(again, expected) and again.etf_settings == expected.etf_settings
            torch.testing.assert_close(logits(again, batch(name)), logits(expected, batch(name)), rtol=1e-4, atol=1e-4)
            assert (again.processor is None) == (name == "resnet")
    commit = hashlib.sha1(b"second").hexdigest()
    assert same_head(load(name, f"me/{name}", revision=commit), models[name]["second"][0])
    with pytest.raises(OSError):
        load(name, f"me/{name}", revision="third", cache_dir=cache)


@pytest.mark.parametrize("name", KINDS)
def test_a_subfolder_of_a_folder_is_one_too(repositories, name):
    models, _, root = repositories
    again = load(name, root / name / "main", subfolder="sub/deep")
    assert same_head(again, models[name]["main"][1]) and (again.processor is None) == (name == "resnet")
    task = "image" if name in ("vit", "resnet") else "text"
    assert load_processor(root / name / "main", task, subfolder="sub/deep") is not None
    with pytest.raises(FileNotFoundError, match=r"no-such-folder|holds no model"):
        load(name, root / name / "main", subfolder="sub")


@pytest.mark.parametrize("name", ["vit", "pooled"])
def test_a_training_checkpoint_is_loaded_from_a_repository(name, tmp_path):
    model = KINDS[name](head="cosine")
    model.save_pretrained(tmp_path / "repository" / "checkpoint-7")
    publish(tmp_path / "cache", f"me/live-{name}", {"main": tmp_path / "repository"})
    again = load(name, f"me/live-{name}", cache_dir=tmp_path / "cache", subfolder="checkpoint-7")
    assert torch.equal(logits(again, batch(name)), logits(model, batch(name)))


@pytest.mark.parametrize("name", KINDS)
def test_the_token_goes_with_every_request_and_into_no_file(repositories, name, tmp_path, monkeypatch):
    asked = {}

    def recorded(function):
        def fetch(*args, **options):
            given = {**dict(zip(inspect.signature(function).parameters, args)), **options}
            asked.update(dict.fromkeys(given.get("filenames", [given.get("filename")]), given["token"]))
            return function(*args, **options)

        return fetch

    for function in ("cached_files", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(transformers.utils.hub, function, recorded(getattr(transformers.utils.hub, function)))
    model = load(name, f"me/{name}", token="hf_very_secret")
    assert "config.json" in asked and set(asked.values()) == {"hf_very_secret"}
    parts = {"vit": "preprocessor_config.json", "resnet": "model.safetensors", "pooled": "2_Dense/model.safetensors"}
    assert parts.get(name, "tokenizer_config.json") in asked
    model.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"very_secret" in path.read_bytes()]
    assert "very_secret" not in repr(model.config) + repr(vars(model.config)) + repr(model.etf_settings)
