"""Law of the models: what transformers' own common tests ask of a stock class holds for the class that is made of it.

The tests are `ModelTesterMixin` and `PipelineTesterMixin` of the installed version's source distribution. It comes from the
package index, or is the archive that ETF_ADAPT_TRANSFORMERS_SDIST names. It lacks the tests of generation and export and those
of the single pipelines: our models do not generate, `test_export` has export, and what a pipeline must give stands below.

What the tests skip by themselves they skip for the stock class as well, for the same reason: `-rP --show-capture=stdout` lists
it. What our class fails stands in the two tables, and nothing else does.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import unittest
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt
from etf_adapt.models.stock_subclass import made_class

pytestmark = pytest.mark.slow

SKIPPED = {
    ("*", "test_problem_types"): (
        "asks for regression and for several labels a row, which the new head does not do: a vertex stands for one class"
    ),
    ("*", "test_can_load_ignoring_mismatched_shapes"): (
        "asks for an error where a folder has another number of classes: from_pretrained gives a new head for them, and warns"
    ),
    ("*", "test_from_pretrained_no_checkpoint"): (
        "loads a state dict without a folder or name, one of which from_pretrained wants, as transformers' Auto classes do: "
        "`adapt` takes the stock model that was loaded so"
    ),
    ("resnet", "test_can_init_all_missing_weights"): (
        "loads an empty state dict without a folder or name: as test_from_pretrained_no_checkpoint. (The mixin skips the other "
        "three, which have been in transformers since before 2023.)"
    ),
}
"""Tests that our class fails and its stock class does not, by backbone: what they ask is not what is promised here."""

SKIPPED_AS_STOCK = {
    (
        "vit",
        "test_model_get_set_embeddings",
    ): "wants an nn.Embedding, and the model embeds patches: the stock class fails as well",
    (
        "resnet",
        "test_model_get_set_embeddings",
    ): "wants an nn.Embedding, and the model has none: the stock class fails as well",
}
"""Tests that the stock class fails too, and which its own tests in transformers replace."""

NAMES = {
    0: "contradiction",
    1: "neutral",
    2: "entailment",
}  # a label of the last name is what zero-shot pipelines look for
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
WORDS = ["[PAD]", "[UNK]", "a", "tree", "This", "example", "is", "."]
TASKS = {"image": ("image-classification",), "text": ("text-classification", "zero-shot")}  # names of the mixin


@dataclass(frozen=True)
class Backbone:
    """A stock class, its configuration, and what the common tests want to know of it."""

    stock: Any
    config: Callable[[], Any]
    task: str
    sizes: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.task == "image":
            return {"pixel_values": torch.rand(13, 3, *[self.sizes["image_size"]] * 2, generator=generator)}
        mask = torch.rand(13, 7, generator=generator).gt(0.3).long()
        mask[:, 0] = 1
        return {"input_ids": torch.randint(1, 99, (13, 7), generator=generator), "attention_mask": mask}

    def processor(self) -> Any:
        if self.task == "image":
            return (
                ViTImageProcessor(size={"height": 16, "width": 16}) if self.stock is ViTForImageClassification else None
            )
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_input_names": ["input_ids", "attention_mask"]}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


LABELS = {"num_labels": 3, "id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
TEXT = {**SIZES, **LABELS, "vocab_size": 99, "max_position_embeddings": 64}
BACKBONES = {
    "vit": Backbone(
        ViTForImageClassification,
        lambda: ViTConfig(**SIZES, **LABELS, image_size=16, patch_size=4),
        "image",
        {"image_size": 16, "patch_size": 4, "seq_length": 17},
        {"test_resize_embeddings": False},
    ),
    "resnet": Backbone(
        TimmWrapperForImageClassification,
        lambda: TimmWrapperConfig(architecture="test_resnet", label_names=list(NAMES.values()), num_labels=3),
        "image",
        # Its hidden states are the maps of its stages: five, the first of 16 x 16 positions.
        {"image_size": 32, "expected_num_hidden_layers": 5, "seq_length": 16, "hidden_size": 16},
        {"test_resize_embeddings": False, "has_attentions": False},
    ),
    "bert": Backbone(BertForSequenceClassification, lambda: BertConfig(**TEXT), "text", {"seq_length": 7}),
    "llama": Backbone(
        LlamaForSequenceClassification,
        lambda: LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0),
        "text",
        {"seq_length": 7},
    ),
}


def made(backbone: Backbone) -> Any:
    """Return the class that `adapt` makes of the stock class, whose call with a configuration builds a model and adapts it."""
    factory = ETFForImageClassification if backbone.task == "image" else ETFForSequenceClassification
    stock = backbone.stock

    def build(cls: type, config: Any) -> Any:
        return adapt(stock(config), config.num_labels)  # not an instance of `cls`, so that no constructor runs after it

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__new__": build}
    return type(stock.__name__, (made_class(factory, stock),), names)


class PipelineTests:
    """What a pipeline must give; stands in for transformers' tests of single pipelines."""

    def __init__(self, task: str) -> None:
        self.task = task

    def __call__(self) -> PipelineTests:  # in the place of a class
        return self

    def get_test_pipeline(
        self, model: Any, tokenizer: Any = None, *, dtype: str, **processors: Any
    ) -> tuple[Any, list[Any]]:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
        examples = [Image.fromarray(image) for image in pixels] if tokenizer is None else ["a tree", "tree a a tree"]
        labels = {"candidate_labels": ["a", "tree"]} if self.task == "zero-shot" else {"top_k": 3}
        given = {"model": model, "tokenizer": tokenizer, "image_processor": processors.get("image_processor")}
        task = {"zero-shot": "zero-shot-classification"}.get(self.task, self.task)
        return transformers.pipeline(task, dtype=dtype, **given, **labels), examples

    def run_pipeline_test(self, pipeline: Any, examples: list[Any]) -> None:
        for result in pipeline(examples):
            if self.task == "zero-shot":
                assert sorted(result["labels"]) == ["a", "tree"]
                scores = result["scores"]
            else:
                assert {entry["label"] for entry in result} == set(NAMES.values())
                scores = [entry["score"] for entry in result]
            assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1.0, abs=2e-3)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Folder with the tests of the source distribution of the installed transformers."""
    folder, version = tmp_path_factory.mktemp("transformers"), transformers.__version__
    archive = os.environ.get("ETF_ADAPT_TRANSFORMERS_SDIST")
    if archive is None:
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"needs the source distribution of transformers {version} from the package index ({reason})")
        archive = folder / f"transformers-{version}.tar.gz"
    with tarfile.open(archive) as contents:
        members = [member for member in contents if member.name.split("/")[1:2] == ["tests"]]
        contents.extractall(folder, members, filter="data")
    return folder / f"transformers-{version}" / "tests"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folder of the models that pipelines load, in the form in which transformers keeps its own for that."""
    root, summary = tmp_path_factory.mktemp("tiny"), {}
    for backbone in BACKBONES.values():
        config, name, processor = backbone.config(), backbone.stock.__name__, backbone.processor()
        model = adapt(backbone.stock(config), 3, id2label=NAMES)
        model.processor = processor
        model.save_pretrained(root / config.model_type / name)
        summary[name] = {
            "tokenizer_classes": [type(processor).__name__] if backbone.task == "text" else [],
            "processor_classes": [type(processor).__name__ if processor else "TimmWrapperImageProcessor"],
            "model_classes": [name],
        }
    Path(root, "reports").mkdir()
    Path(root, "reports", "tiny_model_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def mixins(source, folders, pytestconfig) -> Any:
    """The two classes of transformers' tests; for what the distribution lacks there is something in its place."""
    own_marks = [source / "test_modeling_common.py", Path(transformers.__file__).parent / "testing_utils.py"]
    for file in own_marks:  # pytest refuses those that it does not know
        for mark in set(re.findall(r"\bmark\.(\w+)", file.read_text(encoding="utf-8"))):
            pytestconfig.addinivalue_line("markers", f"{mark}: of transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFORMERS_TINY_MODEL_PATH", str(folders))
        package = ModuleType("tests")
        package.__path__ = [str(source)]
        stand_ins = {
            "tests": package,
            "tests.exporters.test_export": SimpleNamespace(ExportTesterMixin=type("ExportTesterMixin", (), {})),
            "tests.generation.test_utils": SimpleNamespace(GenerationTesterMixin=type("GenerationTesterMixin", (), {})),
        }
        patch.setattr(
            "transformers.utils.direct_transformers_import", lambda path: transformers
        )  # of sources beside it
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        modeling = importlib.import_module("tests.test_modeling_common")
        pipelines = importlib.import_module("tests.test_pipeline_mixin")
        for task in (*TASKS["image"], *TASKS["text"]):
            module, name = pipelines.pipeline_test_mapping[task]["test"].rsplit(".", 1)
            patch.setitem(sys.modules, module, SimpleNamespace(**{name: PipelineTests(task)}))
        yield modeling.ModelTesterMixin, pipelines.PipelineTesterMixin
        for name in [name for name in sys.modules if name.startswith("tests.test_")]:
            del sys.modules[name]


def pipeline_tests(backbone: Backbone) -> list[str]:
    """Name the tests of the pipelines that a model is for, in single and half precision."""
    return [f"test_pipeline_{task.replace('-', '_')}{half}" for task in TASKS[backbone.task] for half in ("", "_fp16")]


def outcomes(mixins: Any, backbone: Backbone, model_class: Any) -> dict[str, tuple[str, str]]:
    """Run all common tests on a class; return passed, skipped or failed, and why, by name."""

    def prepare(case: Any) -> None:
        common = {"batch_size": 13, "is_training": True, "num_labels": 3, **SIZES, **backbone.sizes}
        both = lambda: (backbone.config(), backbone.inputs())
        case.model_tester = SimpleNamespace(
            **common, get_config=backbone.config, prepare_config_and_inputs_for_common=both
        )

    tasks = {"pipeline_model_mapping": dict.fromkeys(TASKS[backbone.task], model_class)}
    body = {"all_model_classes": (model_class,), "setUp": prepare, **tasks, **backbone.switches}
    case = type("CommonTest", (*mixins, unittest.TestCase), body)
    found = {}
    for name in unittest.defaultTestLoader.getTestCaseNames(case):
        if name.startswith("test_pipeline_") and name not in pipeline_tests(backbone):
            continue
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        result = unittest.TestResult()
        with warnings.catch_warnings(record=True):  # those of this library have tests of their own
            warnings.simplefilter("always")  # as for transformers, whose tests look for some
            case(name)(result)
        if broken := result.failures + result.errors:
            found[name] = ("failed", "\n".join(text for _, text in broken))
        else:
            found[name] = ("skipped", result.skipped[0][1]) if result.skipped else ("passed", "")
    return found


@pytest.mark.parametrize("name", BACKBONES)
def test_the_common_tests_of_the_stock_class_hold_for_ours(mixins, name):
    backbone = BACKBONES[name]
    stock, ours = (outcomes(mixins, backbone, model_class) for model_class in (backbone.stock, made(backbone)))
    listed, of_stock = ({test for who, test in table if who in ("*", name)} for table in (SKIPPED, SKIPPED_AS_STOCK))
    failed = {test for test, (outcome, _) in ours.items() if outcome == "failed"}
    unexpected = "\n".join(f"{test}: {ours[test][1]}" for test in sorted(failed - listed - of_stock))
    assert not unexpected, unexpected
    assert failed == listed | of_stock, "a reason is listed for a test that passes"
    assert {test for test, (outcome, _) in stock.items() if outcome == "failed"} == of_stock
    assert [ours[test] for test in pipeline_tests(backbone)] == [("passed", "")] * len(pipeline_tests(backbone))
    reasons = defaultdict(list)
    for test, (outcome, reason) in ours.items():
        if outcome == "skipped":
            assert stock[test] == (outcome, reason), f"{test} is skipped ({reason}) for our class only"
            reasons[reason].append(test)
    passed = sum(outcome == "passed" for outcome, _ in ours.values())
    print(f"{name}: {passed} passed, {sum(map(len, reasons.values()))} skipped by themselves:")
    for reason, tests in sorted(reasons.items()):
        print(f"  {reason}: {', '.join(tests)}")
