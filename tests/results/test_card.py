"""Laws of the model card: what the Hub reads is right, names cannot break out, and an edited card is never overwritten."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from slow_cases import rest_slow
from small_card import HOSTILE_NAMES, card_facts

from etf_adapt.results.card import CARD_FILES, escape_markdown, is_edited, make_card, read_facts, write_card
from etf_adapt.results.card_metadata import is_hub_id, marked_if_folder, read_base_card


def metadata_of(facts):
    return ModelCard(make_card(facts)).data.to_dict()


def test_metadata_are_what_the_hub_reads():
    metadata = metadata_of(card_facts())
    assert metadata["pipeline_tag"] == "image-classification" and metadata["library_name"] == "timm"
    assert metadata["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert metadata["base_model_relation"] == "finetune"
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [0.5, 0.25, 0.01]  # not the group that is empty, nor the NaN


@pytest.mark.parametrize("name", ["my_model", "./encoder", "../models/vit", "a/b/c"])
def test_a_local_base_model_or_data_set_is_not_given_out_as_a_hub_id(name):
    metadata = metadata_of(card_facts(base_model=name))
    assert "base_model" not in metadata and "base_model_relation" not in metadata and "datasets" not in metadata


def test_a_hub_data_set_is_told_by_its_repository_and_its_configuration():
    told = metadata_of(card_facts(dataset={"name": "nyu-mll/glue:sst2", "kind": "Hub"}))
    found = told["model-index"][0]["results"][0]["dataset"]
    assert told["datasets"] == ["nyu-mll/glue"]
    assert (found["type"], found["config"], found["name"]) == ("nyu-mll/glue", "sst2", "nyu-mll/glue:sst2")


def test_the_folder_of_a_base_model_is_no_hub_id_where_it_is_not(tmp_path, monkeypatch):
    (tmp_path / "models/vit").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    names = [marked_if_folder(name) for name in ("models/vit", "google/vit", "./models/vit", "micro")]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert names == ["./models/vit", "google/vit", "./models/vit", "micro"]
    assert [is_hub_id(name) for name in names] == [False, True, False, False]


def test_a_folder_of_this_machine_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models/vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("models/vit") and is_hub_id("other/vit")
    assert is_hub_id("google/vit-base-patch16-224") and not is_hub_id("./encoder") and not is_hub_id("vit")


def test_the_licence_is_the_base_models_and_is_never_made_up(tmp_path):
    assert "license" not in metadata_of(card_facts(inherited=read_base_card(tmp_path)))
    (tmp_path / "README.md").write_text("no metadata")
    assert read_base_card(tmp_path) == {}
    known = {
        "license": "other",
        "license_name": "dinov3-license",
        "license_link": "LICENSE.md",
        "language": ["en", "de"],
    }
    ModelCard(f"---\n{ModelCardData(**known, tags=['x'])}\n---\n").save(tmp_path / "README.md")
    assert read_base_card(tmp_path) == known
    data = metadata_of(card_facts(inherited=known))
    assert data["license_name"] == "dinov3-license" and "language" not in data
    assert metadata_of(card_facts(inherited=known, task="text"))["language"] == ["en", "de"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_cannot_break_out_of_yaml_markdown_or_html(name):
    labels = {"label_names": [name, "x"], "model_id": f"out/{name}", "recalls": [0.1, 0.9], "row_counts": [10, 10]}
    card = make_card(card_facts(dataset={"name": name, "kind": "Hub"}, base_model=name, command=name, **labels))
    read = ModelCard(card).data
    assert read.datasets == [" ".join(name.split())] and read.pipeline_tag == "image-classification"
    shown, _, last = outside_code(ModelCard(card).text).rstrip().rpartition("\n")
    assert not [markup for markup in ("<script>", "49", "-->") if markup in shown]
    assert last.startswith("<!-- Written by etf_adapt")
    usual = make_card(card_facts(recalls=[0.1, 0.9], row_counts=[10, 10]))
    assert [line.split()[0] for line in headings(card)] == [line.split()[0] for line in headings(usual)]


def test_escaping_leaves_one_line():
    assert "\n" not in escape_markdown("two\nlines") and "<" not in escape_markdown("<b>")
    assert escape_markdown("a|b <script> my_class\n_x_") == r"a\|b &lt;script&gt; my_class \_x\_"


def test_the_worst_classes_come_first_and_those_without_rows_are_named_in_the_limits():
    names, counts = ["a", "b", "c", "d"], [50, 40, 30, 3]
    recalls, rows = [0.9, 0.2, None, 0.2], [10, 4, 0, 8]
    facts = card_facts(label_names=names, class_counts=counts, recalls=recalls, row_counts=rows)
    text = make_card(facts)
    assert text.index("| d | 3 | 8 | 20.0 |") < text.index("| b | 40 | 4 | 20.0 |") and "| c |" not in text
    assert "Classes without test examples, whose recalls are unknown: 1." in text


def test_what_a_run_lacks_is_left_out():
    text = make_card(card_facts(table=[], scores={}, alignment={}, collapse={}, calibrated_rows=0, is_adjusted=False))
    assert text.count("Not evaluated.") == 2 and "not calibrated" in text
    assert not [word for word in ("collapse at", "alignment", "adjusted", "None", "nan", "lowest") if word in text]
    full = make_card(card_facts(alignment={"rows": 1208, "penalties": [0.1]}, collapse={"NC1": 0.12, "NC2": math.nan}))
    assert "on 1,208 training examples, penalty 0.1" in full and "full collapse): NC1 0.12.\n" in full


@pytest.mark.parametrize("library", ["transformers", "timm", "sentence_transformers"])
@pytest.mark.parametrize("task", ["image", "text"])
def test_the_lines_that_load_it_are_python(library, task):
    text = make_card(card_facts(library=library, task=task, model_id='me/quo"te'))
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


def test_a_model_of_pairs_is_shown_with_a_pair():
    pairs = {"name": "qnli", "columns": {"input": "question", "pair": "sentence", "label": "label"}}
    for library, call in (
        ("transformers", 'classify({"text": "a text", "text_pair": "its pair"})'),
        ("sentence_transformers", 'model.encode([("a text", "its pair")], '),
    ):
        assert call in make_card(card_facts(library=library, task="text", dataset=pairs))
        assert call not in make_card(card_facts(library=library, task="text"))


def test_it_is_written_with_its_figures_and_its_facts(tmp_path):
    facts = card_facts(recalls=[0.5, None], row_counts=[10, 0])
    assert write_card(tmp_path, facts) == tmp_path / "README.md"
    text = (tmp_path / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == set(CARD_FILES)
    assert set(re.findall(r"\]\(([\w.]+)\)", text)) == {"class_counts.png", "recalls.png"}
    for name in ("class_counts.png", "recalls.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size[0] > 300 and not {"date", "Creation Time"} & set(image.info)
    again = read_facts(tmp_path)
    assert make_card(again) == text and read_facts(tmp_path / "other") is None
    assert "timm/x" in make_card(dataclasses.replace(again, model_id="timm/x", on_hub=True))


def test_the_card_of_an_earlier_run_is_replaced_whole(tmp_path):
    write_card(tmp_path, card_facts(base_model="google/vit", inherited={"license": "apache-2.0"}))
    new = card_facts(base_model="./local", inherited={"license": "cc-by-nc-4.0"}, scores={}, table=[])
    assert write_card(tmp_path, new).read_text() == make_card(new)


EDITS = {
    "a word": lambda text: text.replace("## Limits", "Ask Ada.\n\n## Limits"),
    "metadata": lambda text: text.replace("library_name:", "license: mit\nlibrary_name:"),
    "no YAML": lambda text: text.replace("library_name:", "license: [mit\nlibrary_name:"),
    "words at the end": lambda text: text + "Ask Ada.\n",
    "no digest": lambda text: text.rpartition("<!--")[0],
    "a card of one's own": lambda text: "# Birds\n\nby Ada\n",
}


@pytest.mark.parametrize("name", rest_slow(EDITS, fast=3))
def test_an_edited_card_is_never_overwritten_and_the_new_one_stands_beside_it(tmp_path, caplog, name):
    file = write_card(tmp_path, card_facts())
    assert not is_edited(file)
    file.write_text(edited := EDITS[name](file.read_text()))
    for command in ("one", "two"):
        new = write_card(tmp_path, card_facts(command=command))
        assert file.read_text() == edited and new.read_text() == make_card(card_facts(command=command))
    assert (
        new.name == "README.new.md"
        and caplog.messages == ["README.md was edited and stays as it is; the new card is README.new.md."] * 2
    )


def test_white_space_at_the_end_and_line_ends_are_no_edit(tmp_path):
    file = write_card(tmp_path, card_facts())
    file.write_bytes((file.read_text() + "\n\n").replace("\n", "\r\n").encode())
    assert not is_edited(file) and not is_edited(tmp_path / "missing")


def test_facts_of_another_version_are_none(tmp_path):
    write_card(tmp_path, card_facts())
    written = json.loads((tmp_path / "card.json").read_text())
    without = {name: value for name, value in written["facts"].items() if name != "split"}
    for content in ({"facts": written["facts"] | {"new": 1}}, {"facts": without}, {}, "{"):
        (tmp_path / "card.json").write_text(content if content == "{" else json.dumps(content))
        assert read_facts(tmp_path) is None


def outside_code(text: str) -> str:
    """Return the lines that stand in no fenced block."""
    kept, fence = [], None
    for line in text.splitlines():
        ticks = len(line) - len(line.lstrip("`"))
        if fence is None and ticks >= 3:
            fence = ticks
        elif fence is not None and line == "`" * ticks and ticks >= fence:
            fence = None
        elif fence is None:
            kept.append(line)
    return "\n".join(kept)


def headings(card: str) -> list[str]:
    return [line for line in outside_code(card).splitlines() if line.startswith("#")]
