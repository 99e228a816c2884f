"""Laws of the swap: every kind of head is found, replaced and put back, and what it reads is what the backbone gives."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models.metaformer import MetaFormer
from timm.models.volo import VOLO
from torch import nn

from etf_adapt.heads.in_model import HeadError, head_modules, read_features
from etf_adapt.models.swap import find_heads, restore_head, swap_head

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**TINY, "vocab_size": 20, "num_labels": 5}
IMAGE = {**TINY, "image_size": 8, "patch_size": 4, "num_labels": 5}


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def texts():
    return {"input_ids": torch.randint(1, 20, (2, 6), generator=torch.Generator().manual_seed(0))}


def of_timm(name, **settings):
    return lambda: timm.create_model(name, num_classes=5, **settings)


def shrunken(stock, architecture, **settings):
    """Make a small model of an architecture whose constructor in timm's registry fixes all sizes."""

    def make():
        model = stock(num_classes=5, **settings)
        model.pretrained_cfg = {"architecture": architecture}
        return model

    return make


def of_transformers(stock, config, **settings):
    return lambda: getattr(transformers, stock)(getattr(transformers, config)(**settings))


def timm_wrapper():
    labels = {"label_names": list("abcde"), "num_labels": 5}
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_classes=5, **labels)
    return transformers.TimmWrapperForImageClassification(config)


@dataclass
class Case:
    """A model, its input, and where its head is."""

    make: Any
    batch: Any
    paths: tuple[str, ...]


SMALL_LEVIT = {"embed_dim": (16, 16, 16), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)}
SMALL_FORMER = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "use_mlp_head": True}
SMALL_VOLO = {
    "layers": (1, 1, 1, 1),
    "embed_dims": (16, 32, 32, 32),
    "num_heads": (2, 2, 2, 2),
    "stem_hidden_dim": 8,
    "img_size": 64,
}

CASES = {
    "linear": Case(of_timm("test_vit"), images(160), ("head",)),
    "linear after a pool": Case(of_timm("test_resnet"), images(32), ("fc",)),
    "leaf in a head": Case(of_timm("test_convnext"), images(32), ("head.fc",)),
    "leaf deep in a head": Case(shrunken(MetaFormer, "caformer_s18", **SMALL_FORMER), images(32), ("head.fc.fc2",)),
    "two heads averaged (DeiT)": Case(
        of_timm("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2),
        images(32),
        ("head", "head_dist"),
    ),
    "two heads averaged (LeViT)": Case(
        of_timm("levit_128s", img_size=64, **SMALL_LEVIT), images(64), ("head.linear", "head_dist.linear")
    ),
    "head and head of the tokens (VOLO)": Case(
        shrunken(VOLO, "volo_d1_224", **SMALL_VOLO),
        images(64),
        ("aux_head", "head"),
    ),
    "1x1 convolution": Case(of_timm("dpn48b"), images(32), ("classifier",)),
    "TimmWrapper": Case(timm_wrapper, {"pixel_values": images(160)}, ("timm_model.head",)),
    "ViT": Case(
        of_transformers("ViTForImageClassification", "ViTConfig", **IMAGE), {"pixel_values": images(8)}, ("classifier",)
    ),
    "MobileNetV2": Case(
        of_transformers("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.25, num_labels=5),
        {"pixel_values": images(32)},
        ("classifier",),
    ),
    "BERT": Case(of_transformers("BertForSequenceClassification", "BertConfig", **TEXT), texts(), ("classifier",)),
    "projection of a head (RoBERTa)": Case(
        of_transformers("RobertaForSequenceClassification", "RobertaConfig", **TEXT), texts(), ("classifier.out_proj",)
    ),
    "tokens, without a bias (Llama)": Case(
        of_transformers("LlamaForSequenceClassification", "LlamaConfig", **TEXT, num_key_value_heads=2, pad_token_id=0),
        texts(),
        ("score",),
    ),
    "constructor that draws (DiffLlama)": Case(
        of_transformers(
            "DiffLlamaForSequenceClassification", "DiffLlamaConfig", **TEXT, num_key_value_heads=2, pad_token_id=0
        ),
        texts(),
        ("score",),
    ),
    "two heads averaged (transformers' LeViT)": Case(
        of_transformers(
            "LevitForImageClassificationWithTeacher",
            "LevitConfig",
            image_size=32,
            hidden_sizes=[8, 8, 8],
            num_attention_heads=[1, 1, 1],
            depths=[1, 1, 1],
            key_dim=[4, 4, 4],
            num_labels=5,
        ),
        {"pixel_values": images(32)},
        ("classifier.linear", "classifier_distill.linear"),
    ),
}
SINGLE = [name for name, case in CASES.items() if len(case.paths) == 1]


def run(model, batch):
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    return output if isinstance(output, torch.Tensor) else output.logits


def settings_of(model):
    config = model.config.to_dict() if hasattr(model, "config") else None
    attributes = {
        (path, name): vars(module).get(name)
        for path, module in model.named_modules()
        for name in ("num_classes", "num_labels")
    }
    return config, attributes


@pytest.mark.parametrize("name", CASES)
def test_a_head_is_found_replaced_and_put_back(name):
    case = CASES[name]
    model = case.make().eval()
    layers = {path: model.get_submodule(path) for path in case.paths}
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    settings, before = settings_of(model), run(model, case.batch).detach()
    assert tuple(find_heads(model)) == case.paths
    assert swap_head(model, 3) is model and tuple(head_modules(model)) == tuple(find_heads(model)) == case.paths
    new = model.state_dict()
    assert new.keys() == weights.keys()
    of_head = tuple(f"{path}." for path in case.paths)
    assert all(torch.equal(new[key], weights[key]) for key in weights if not key.startswith(of_head))
    assert all(new[key].shape == (3, *weights[key].shape[1:]) for key in weights if key.startswith(of_head))
    logits = run(model, case.batch)
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(parameter.grad is None for head in head_modules(model).values() for parameter in head.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    swap_head(model, 4, kind="linear")  # restore brings back the first head, not the second
    assert run(model, case.batch).shape == (2, 4)
    assert restore_head(model) is model
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert settings_of(model) == settings and torch.equal(run(model, case.batch), before)
    with pytest.raises(HeadError, match="no earlier head"):
        restore_head(model)


@pytest.mark.parametrize("kind", ["etf", "linear", "cosine", "paper"])
@pytest.mark.parametrize("name", SINGLE)
def test_the_head_scores_the_features_that_are_read(name, kind):
    case = CASES[name]
    model = case.make().eval()
    try:
        swap_head(model, 3, kind=kind)
    except HeadError as error:
        assert kind in ("cosine", "paper") and ("convolution" in str(error) or "bias" in str(error))
        return
    [head] = head_modules(model).values()
    logits = run(model, case.batch)
    [features] = read_features(model, case.batch)
    assert features.shape == (2, head.weight.shape[1])
    shaped = features[:, :, None, None] if head.weight.ndim == 4 else features
    torch.testing.assert_close(head(shaped).flatten(1), logits, rtol=1e-4, atol=1e-5)
    assert head_modules(model) == dict.fromkeys(case.paths, head)
    assert torch.equal(run(model, case.batch), logits)


@pytest.mark.parametrize("name", [name for name in CASES if name not in SINGLE])
def test_averaged_heads_score_the_features_that_are_read(name):
    model = CASES[name].make().eval()
    swap_head(model, 3)
    heads = list(head_modules(model).values())
    features = read_features(model, CASES[name].batch)
    assert [rows.shape for rows in features] == [(2, head.weight.shape[1]) for head in heads]
    first, second = (head(rows) for head, rows in zip(heads, features))
    if "VOLO" not in name:
        torch.testing.assert_close((first + second) / 2, run(model, CASES[name].batch), rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(head) for head in heads)


def test_features_follow_the_mode_and_gradients_of_the_caller():
    case = CASES["BERT"]
    model = swap_head(case.make(), 3)
    with torch.no_grad():
        assert not read_features(model, case.batch)[0].requires_grad
    assert read_features(model, case.batch)[0].requires_grad and model.training


@pytest.mark.parametrize("name", ["linear", "two heads averaged (DeiT)"])
def test_the_head_is_back_after_an_error_while_features_are_read(name):
    case = CASES[name]
    model = swap_head(case.make().eval(), 3)
    heads, logits = head_modules(model), run(model, case.batch)
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=r"."):
        read_features(model, torch.zeros(2, 7))
    assert head_modules(model) == heads and not any("forward" in vars(head) for head in heads.values())
    assert torch.equal(run(model, case.batch), logits)


def test_features_of_a_model_without_our_head_are_refused():
    with pytest.raises(HeadError, match="swap_head"):
        read_features(CASES["linear"].make(), images(160))


def test_a_model_that_transforms_its_logits_has_no_features_to_read():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 3)

        def forward(self, inputs):
            return self.out(inputs).repeat(1, 2)

    model = swap_head(Doubled(), 3, head="out")
    with pytest.raises(HeadError, match=r"`out` reads 4 features"):
        read_features(model, torch.randn(2, 4))


def test_a_layer_at_two_paths_stays_one_layer():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.out = nn.Linear(4, 5)
            self.alias = nn.ModuleDict({"same": self.out})

        def forward(self, inputs):
            return self.alias["same"](self.body(inputs))

    model = Shared()
    old, inputs = model.out, torch.randn(2, 4)
    swap_head(model, 3, head="out")
    assert model.out is model.alias["same"] and model(inputs).shape == (2, 3)
    [features] = read_features(model, inputs)
    assert torch.equal(model.out(features), model(inputs)) and model.out is model.alias["same"]
    restore_head(model)
    assert model.out is old is model.alias["same"]


def test_a_model_built_without_a_classifier_gets_one():
    for name, path in (("test_resnet", "fc"), ("test_vit", "head"), ("test_convnext", "head.fc")):
        model = timm.create_model(name, num_classes=0).eval()
        backbone = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        swap_head(model, 3)
        assert list(head_modules(model)) == [path] and model.num_classes == 3
        assert model(images(160)).shape == (2, 3)
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in backbone.items())


def test_names_and_settings_of_the_classes_go_with_the_head():
    model = CASES["ViT"].make()
    model.config.problem_type = "single_label_classification"
    swap_head(model, 3, id2label={0: "x", 1: "y", 2: "z"})
    assert model.config.num_labels == model.num_labels == 3 and model.config.problem_type is None
    assert model.config.label2id == {"x": 0, "y": 1, "z": 2}
    restore_head(model)
    assert model.config.num_labels == model.num_labels == 5
    assert model.config.problem_type == "single_label_classification" and model.config.id2label[4] == "LABEL_4"
    wrapped = timm_wrapper()
    swap_head(wrapped, 3, id2label=["x", "y", "z"])
    assert wrapped.config.to_dict()["label_names"] == ["x", "y", "z"] and wrapped.timm_model.num_classes == 3
    restore_head(wrapped)
    assert wrapped.config.to_dict()["label_names"] == list("abcde") and wrapped.timm_model.num_classes == 5


def test_the_head_takes_device_dtype_and_mode_of_the_layer():
    model = CASES["BERT"].make().to(torch.bfloat16).eval()
    swap_head(model, 3)
    assert model.classifier.weight.dtype == torch.bfloat16 and not model.classifier.training
    with torch.device("meta"):
        empty = CASES["BERT"].make()
    swap_head(empty, 3)
    assert empty.classifier.weight.is_meta


def test_the_generator_alone_decides_a_random_frame():
    def rows(seed):
        model = swap_head(CASES["linear"].make(), 3, generator=torch.Generator().manual_seed(seed))
        return model.head.weight

    assert torch.equal(rows(1), rows(1)) and not torch.equal(rows(1), rows(2))


@pytest.mark.parametrize("name", ["linear", "ViT", "two heads averaged (DeiT)"])
def test_a_copy_is_independent_and_can_be_restored(name):
    case = CASES[name]
    model = case.make().eval()
    before = run(model, case.batch)
    swap_head(model, 3)
    twin = copy.deepcopy(model)
    restore_head(model)
    assert run(twin, case.batch).shape == (2, 3) and run(model, case.batch).shape == (2, 5)
    restore_head(twin)
    assert torch.equal(run(twin, case.batch), before)
    assert twin.get_submodule(case.paths[0]) is not model.get_submodule(case.paths[0])


@pytest.mark.parametrize("name", ["ViT", "constructor that draws (DiffLlama)"])
def test_finding_touches_no_weight_and_no_random_number(name):
    model = CASES[name].make()
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    find_heads(model)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_a_model_of_another_problem_becomes_a_classifier_and_says_so(problem_type):
    model = CASES["BERT"].make()
    model.config.problem_type = problem_type
    with pytest.warns(UserWarning, match=f"`problem_type` '{problem_type}': .* one of 3 classes"):
        swap_head(model, 3)
    assert model.config.problem_type is None
    restore_head(model)
    assert model.config.problem_type == problem_type


# What is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_classes": 1}, r"`num_classes` \(=1\) must be at least 2"),
        ({"num_classes": 0}, r"`num_classes` \(=0\)"),
        ({"num_classes": 3, "head": "klassifier"}, r"`head` \(='klassifier'\) is no module of ViT"),
        ({"num_classes": 3, "head": "vit.layernorm"}, "LayerNorm"),
        ({"num_classes": 3, "head": "vit.embeddings.patch_embeddings.projection"}, "1x1"),
        ({"num_classes": 3, "kind": "liner"}, "liner"),
        ({"num_classes": 3, "id2label": {0: "a", 1: "b"}}, "classes 0 to 2"),
        ({"num_classes": 3, "id2label": {1: "a", 2: "b", 3: "c"}}, "classes 0 to 2"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(settings, words):
    model = CASES["ViT"].make()
    modules, before = dict(model.named_modules()), settings_of(model)
    with pytest.raises(HeadError, match=words):
        swap_head(model, **settings)
    assert dict(model.named_modules()) == modules and settings_of(model) == before
    with pytest.raises(HeadError, match="no earlier head"):
        restore_head(model)


def test_a_second_swap_that_is_refused_leaves_several_heads_as_they_were():
    model = CASES["two heads averaged (DeiT)"].make()
    modules = dict(model.named_modules())
    with pytest.raises(HeadError, match="several heads"):
        swap_head(model, 3, kind="paper")
    assert dict(model.named_modules()) == modules


def test_models_without_a_head_are_refused():
    with pytest.raises(HeadError, match="ViTModel has no classification layer"):
        swap_head(transformers.ViTModel(transformers.ViTConfig(**IMAGE)), 3)
    with pytest.raises(HeadError, match=r"Linear is neither.*head="):
        swap_head(nn.Linear(3, 3), 3)
    with torch.device("meta"):
        encoder = timm.create_model("gemma4_vit_167m_enc")
    with pytest.raises(HeadError, match="gemma4_vit_167m_enc is an encoder"):
        swap_head(encoder, 3)


class TwoHeads(nn.Module):
    """Two heads whose logits are added; the second reads every token, which come before the features."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, tokens):
        tokens = self.body(tokens)
        return self.first(tokens[:, 0, 0]) + self.second(tokens).mean(dim=(1, 2))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("paths", [["first", "second"], ["first"]])
def test_features_are_read_in_front_of_each_head_in_a_compiled_model_too(compiled, paths):
    model, tokens = TwoHeads(), torch.randn(2, 3, 3, 4)
    if len(paths) == 1:
        model.second = nn.Identity()
        model.forward = lambda tokens: model.first(model.body(tokens)[:, 0, 0])
    swap_head(model, 3, head=paths)
    expected = [model.body(tokens)[:, 0, 0], model.body(tokens).mean(dim=(1, 2))][: len(paths)]
    reader = torch.compile(model, backend="eager") if compiled else model
    logits = reader(tokens)
    for features, rows in zip(read_features(reader, tokens), expected):
        torch.testing.assert_close(features, rows)
    assert torch.equal(reader(tokens), logits) and not any(
        "forward" in vars(head) for head in head_modules(model).values()
    )


def structure(model):
    modules = {path: type(module) for path, module in model.named_modules()}
    return modules, {name: id(parameter) for name, parameter in model.named_parameters()}, model.num_classes


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "repvit_m0_9"])
def test_a_model_built_without_a_classifier_goes_back_to_none(name):
    model = timm.create_model(name, num_classes=0)
    before = structure(model)
    with pytest.raises(HeadError, match=f"{name} was built with num_classes=0"):
        find_heads(model)
    with pytest.raises(HeadError, match="liner"):
        swap_head(model, 3, kind="liner")
    assert structure(model) == before
    swap_head(model, 3)
    assert model.num_classes == 3 and len(head_modules(model)) == 1
    assert structure(restore_head(model)) == before


def test_the_arguments_that_a_timm_model_was_built_with_decide_its_heads():
    assert find_heads(timm.create_model("repvit_m0_9", num_classes=5)) == ["head.head.l", "head.head_dist.l"]
    assert find_heads(timm.create_model("repvit_m0_9", num_classes=5, distillation=False)) == ["head.head.l"]
    with pytest.raises(HeadError, match="test_resnet has no classification layer"):
        find_heads(timm.create_model("test_resnet", features_only=True))


def test_a_model_that_was_changed_since_it_was_built_needs_a_name():
    moved = timm.create_model("test_vit", num_classes=5)
    moved.head = nn.Sequential(nn.Dropout(), moved.head)
    second = timm.create_model("test_vit", num_classes=5)
    second.extra = nn.Linear(64, 5)
    for model, path in ((moved, "head.1"), (second, "head")):
        with pytest.raises(HeadError, match="built otherwise or changed since"):
            swap_head(model, 3)
        assert swap_head(model, 3, head=path)(images(160)).shape == (2, 3)


def test_no_head_is_replaced_where_one_of_several_cannot_be():
    model = CASES["two heads averaged (DeiT)"].make()
    model.head_dist = nn.Conv2d(24, 5, 3)
    before = structure(model)
    with pytest.raises(HeadError, match="1x1"):
        swap_head(model, 3)
    assert structure(model) == before
    with pytest.raises(HeadError, match="no earlier head"):
        restore_head(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_head_is_refused(dtype):
    model = timm.create_model("test_vit", num_classes=5)
    layer = model.head
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(HeadError, match=r"`head` \(Linear\) is quantized"):
        swap_head(model, 3)
    assert model.head is layer


def test_a_parametrized_head_is_refused():
    model = timm.create_model("test_vit", num_classes=5)
    nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(HeadError, match="ParametrizedLinear"):
        swap_head(model, 3)


def test_a_head_comes_back_in_the_dtype_that_the_model_has_now():
    model = swap_head(timm.create_model("test_vit", num_classes=5).eval(), 3).to(torch.bfloat16)
    restore_head(model)
    assert model(images(160).bfloat16()).shape == (2, 5)


def test_a_pickled_model_can_be_restored():
    model = swap_head(CASES["BERT"].make(), 3)
    twin = pickle.loads(pickle.dumps(model))
    restore_head(twin), restore_head(model)
    assert torch.equal(twin.classifier.weight, model.classifier.weight) and twin.config.num_labels == 5
    assert "_etf_adapt_swap" not in vars(model)


def test_names_that_come_twice_have_no_index():
    model = swap_head(CASES["BERT"].make(), 3, id2label={2: "y", 0: "x", 1: "x"})
    assert list(model.config.id2label.items()) == [(0, "x"), (1, "x"), (2, "y")] and model.config.label2id is None
