"""Laws of model folders: names, configurations, processors and digests, in both libraries' layouts."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import TimmWrapperConfig, ViTConfig, ViTImageProcessor

from etf_adapt.models.digests import layer_digest
from etf_adapt.models.folders import is_training_checkpoint, load_config, load_processor, locate, read_weights
from etf_adapt.models.timm_layout import write_timm_folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("checkpoint-7", True),
        ("a/checkpoint-120/", True),
        ("checkpoint", False),
        ("checkpoint-best", False),
        ("my-checkpoint-7", False),
        ("checkpoint-7/last", False),
    ],
)
def test_only_the_names_that_trainer_gives_are_checkpoints(name, expected):
    assert is_training_checkpoint(name) is expected


def test_the_digest_is_that_of_the_values():
    weight, bias = torch.randn(3, 4).bfloat16(), torch.randn(3).bfloat16()
    digest = layer_digest([(weight, bias)])
    assert layer_digest([(weight.float(), bias.double())]) == digest
    assert layer_digest([(weight.t().contiguous().t(), bias)]) == digest  # strides do not count
    assert len({digest, layer_digest([(2 * weight, bias)]), layer_digest([(weight, None)])}) == 3
    assert layer_digest([(weight, None), (2 * weight, None)]) != layer_digest([(2 * weight, None), (weight, None)])


def test_a_timm_folder_is_read_by_timm_and_by_transformers_configuration(tmp_path):
    names = {0: "ash", 1: "birch", 2: "cedar"}
    config, _ = load_config("timm/test_resnet.r160_in1k", fetch=False)
    config.model_args, config.num_labels, config.id2label = {"num_classes": 9, "drop_rate": 0.1}, 3, names
    model = timm.create_model("test_resnet", num_classes=3).eval()
    write_timm_folder(tmp_path, config, model, model.state_dict())
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_args"] == {"drop_rate": 0.1} and written["label_names"] == list(names.values())
    assert written["num_classes"] == written["pretrained_cfg"]["num_classes"] == 3
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    loaded, _ = load_config(str(tmp_path), fetch=True)
    assert isinstance(loaded, TimmWrapperConfig) and loaded.id2label == names


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    config, _ = load_config("timm/test_resnet.r160_in1k", fetch=False)
    config.num_labels, shared = 3, torch.randn(2, 3)
    model = timm.create_model("test_resnet", num_classes=3)
    write_timm_folder(tmp_path, config, model, {"a": shared, "b": shared, "c": shared.t()})
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["a"], shared) and torch.equal(found["b"], shared) and torch.equal(found["c"], shared.t())


def test_a_num_classes_in_a_folders_model_args_is_dropped(tmp_path):
    settings = {"architecture": "test_vit", "num_classes": 3, "model_args": {"num_classes": 3, "img_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "pretrained_cfg": {"input_size": [3, 160, 160]}}))
    config, _ = load_config(str(tmp_path), fetch=True)
    assert config.model_args == {"img_size": 64}
    assert load_processor(str(tmp_path), "image")["input_size"] == (3, 64, 64)


def test_options_that_the_configuration_does_not_take_are_given_back(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    config, rest = load_config(str(tmp_path), fetch=True, hidden_size=48, attn_implementation="eager", token=None)
    assert config.hidden_size == 48 and "hidden_size" not in rest and rest["token"] is None


def test_an_image_processor_is_found_and_a_missing_one_named(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    for task, what in (("image", "image processor"), ("text", "tokenizer")):
        with pytest.raises(FileNotFoundError, match=f"holds no {what}"):
            load_processor(tmp_path, task)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert load_processor(tmp_path, "image").size["height"] == 8
    with pytest.raises(ValueError, match=r"`task` \(='sound'\)"):
        load_processor(tmp_path, "sound")


def test_one_file_and_shards_read_alike_and_a_lost_shard_is_named(tmp_path):
    first, second = {"a": torch.randn(2)}, {"b": torch.randn(3).half()}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_weights(tmp_path)
    assert torch.equal(found["a"], first["a"]) and torch.equal(found["b"], second["b"])
    assert found["b"].dtype == torch.float16
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        read_weights(tmp_path)


def test_unknown_models_are_refused_and_local_ones_found(tmp_path):
    with pytest.raises(ValueError, match="no_such_model"):
        load_config("timm/no_such_model", fetch=False)
    with pytest.raises(FileNotFoundError, match="config"):
        locate(str(tmp_path), fetch=True)
    ViTConfig().save_pretrained(tmp_path)
    assert locate(str(tmp_path), fetch=True) == str(tmp_path)
