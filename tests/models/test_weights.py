"""Laws of a file of weights with nothing beside it: the backbone is that of the file, and another's is refused by name."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from slow_cases import rest_slow
from small_models import batch, logits, stock_vit, the_head

from etf_adapt.models.auto import ETFForImageClassification

NAME = "timm/test_vit.r160_in1k"


def stock(num_classes=7, **settings):
    torch.manual_seed(5)
    return timm.create_model("test_vit", num_classes=num_classes, **settings).eval()


def load(path, name=NAME, **settings):
    return ETFForImageClassification.from_pretrained(name, checkpoint_path=path, **{"num_labels": 3, **settings})


FORMS = {
    "weights.safetensors": lambda state, path: save_file(state, path),
    "pytorch_model.bin": torch.save,
    "model_best.pth.tar": lambda state, path: torch.save({"epoch": 3, "arch": "test_vit", "state_dict": state}, path),
    "parallel.pth": lambda state, path: torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path),
}


@pytest.mark.parametrize(
    ("form", "num_classes"),
    rest_slow([("weights.safetensors", count) for count in (3, 0)] + [(form, 7) for form in FORMS], fast=3),
)
def test_the_backbone_is_that_of_the_file_and_the_head_is_new(form, num_classes, tmp_path, caplog):
    model = stock(num_classes)
    FORMS[form](model.state_dict(), tmp_path / form)
    again = load(tmp_path / form)
    taken = sum(not name.startswith("head.") for name in model.state_dict())
    assert f"{form}'): {taken} tensors of the backbone loaded, its classifier left out" in caplog.text
    frame = ETFForImageClassification.from_pretrained(NAME, num_labels=3, pretrained=False)
    assert torch.equal(the_head(again).weight, the_head(frame).weight) and again.config.num_labels == 3
    found = again.timm_model.state_dict()
    backbone = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    assert backbone and all(torch.equal(found[name], tensor) for name, tensor in backbone.items())
    pixels = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(again.timm_model.forward_features(pixels), model.forward_features(pixels))
    again.save_pretrained(tmp_path / "out")
    back = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(back(pixels), logits(again, {"pixel_values": pixels}))


def test_it_is_loaded_as_float32_unless_told(tmp_path):
    save_file(stock().bfloat16().state_dict(), tmp_path / "half.safetensors")
    for settings, dtype in [({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)]:
        assert {tensor.dtype for tensor in load(tmp_path / "half.safetensors", **settings).parameters()} == {dtype}


def test_the_architecture_may_be_a_folder_of_either_library(tmp_path):
    original = stock_vit()
    original.save_pretrained(tmp_path / "folder")
    other = stock_vit(num_labels=9)
    other.save_pretrained(tmp_path / "other")  # under the names of the disk, which are not those in memory
    again = load(tmp_path / "other" / "model.safetensors", tmp_path / "folder")
    features = [model.vit(**batch("vit")).last_hidden_state for model in (again.eval(), other)]
    assert torch.equal(*features)
    micro = ETFForImageClassification.from_pretrained("micro", num_labels=3)
    save_file(micro.timm_model.state_dict(), tmp_path / "micro.safetensors")
    again = load(tmp_path / "micro.safetensors", "micro")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in micro.state_dict().items())


def test_a_file_that_does_not_count_the_batches_of_batch_norms_is_whole(tmp_path):
    state = {key: tensor for key, tensor in timm.create_model("test_resnet").state_dict().items() if "num_b" not in key}
    save_file(state, tmp_path / "old.safetensors")
    found = load(tmp_path / "old.safetensors", "timm/test_resnet.r160_in1k").timm_model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items() if not key.startswith("fc."))


def without(state):
    del state["blocks.0.attn.qkv.weight"]
    return state


FAULTS = {
    "part": (without, r"lacks,.* timm_model\.blocks\.0\.attn\.qkv\.weight \(1 in all"),
    "more": (lambda state: {**state, "stem.weight": torch.ones(2)}, r"has beside (timm_model\.)?stem\.weight"),
    "another size": (lambda _: stock(img_size=64).state_dict(), r"has in another shape, timm_model\.pos_embed"),
    "another model": (lambda _: timm.create_model("test_resnet").state_dict(), r"lacks.*\(\d+ in all\); it has beside"),
    "adapter": (lambda _: {"base_model.q.lora_A.weight": torch.ones(2)}, "lacks"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_weights_of_another_model_are_refused_by_name(fault, tmp_path):
    change, words = FAULTS[fault]
    save_file(change(stock().state_dict()), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=rf"`checkpoint_path` \(='.*weights.safetensors'\).*test_vit.*{words}"):
        load(tmp_path / "weights.safetensors")


class Code:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_is_no_file_of_weights_is_refused_and_no_code_runs(tmp_path):
    torch.save({"state_dict": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    torch.save(stock(), tmp_path / "whole_model.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    save_file(stock().state_dict(), tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:1000])
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=rf"{path.name}'\) holds no state dict .*save the tensors") as said:
            load(path)
        assert len(str(said.value).splitlines()) == 1 and len(str(said.value)) < 600
    with pytest.raises(FileNotFoundError, match=r"`checkpoint_path` .*nowhere\.pth'\) is no file"):
        load(tmp_path / "nowhere.pth")
    assert not (tmp_path / "ran").exists()


def test_random_weights_and_a_file_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match="pretrained=False: leave out one"):
        load(tmp_path / "any.pth", pretrained=False)
