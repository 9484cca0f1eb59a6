"""The card says what was measured, and no string of the user's can forge another part of it."""

import json
import math
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from small_runs import PAIRS, PROBES, ROTATION, make_run

from mmssl.adaptation.table import Table
from mmssl.errors import RunError
from mmssl.hub import model_card
from mmssl.hub.card import cost, final_metrics
from mmssl.hub.markdown import cell, code, fence, markdown
from mmssl.hub.privacy import public_table, publishable
from mmssl.hub.scores import eval_results
from mmssl.recipe import validate
from mmssl.run_directory import Audited, Machine, keep_audit, keep_machine


def front_matter(text: str) -> dict:
    """Parsed as the Hub does: everything up to the first line of three dashes."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("card") / "run", ROTATION)


def with_recipe(run, **changes):
    run.recipe = validate({**run.recipe.model_dump(mode="json", exclude_none=True), **changes}, "recipe")
    return run


def test_card_says_how_to_search_without_mmssl(tmp_path) -> None:
    card = model_card(make_run(tmp_path / "pairs", PAIRS))
    assert (
        "\n\n`native/README.md` has the lines that search `image` by `text` with them and "
        "`native/projections.safetensors`.\n\n## Recipe"
    ) in card
    assert "projections" not in model_card(make_run(tmp_path / "turns", ROTATION))


def test_card_holds_the_run(run) -> None:
    text = model_card(with_recipe(run, license="apache-2.0"), "me/turns")
    meta = front_matter(text)
    assert meta["library_name"] == "mmssl"
    assert meta["license"] == "apache-2.0"
    assert {"rotation", "image", "self-supervised-learning"} <= set(meta["tags"])
    assert "160, in 20 of 20 steps of 8 rows" in text
    assert "| `loss` | 1.3 | 1.386 |" in text  # the last value, beside ln 4
    assert "| `accuracy` | 0.45 | 0.25 |" in text
    assert "\nVerdict: too few answers to tell: accuracy 0.4 against 0.25 by guessing (last 2 records, 16 " in text
    assert "Probe `knn` of the column `shape`: 80 training rows, 20 test rows, 8 classes, 3 seed(s); " in text
    assert "; test rows: `a fifth of toy`." in text
    assert "| `pretrained` | `pooled` | 50.0 (40.0 – 60.0) | 50.0 |" in text
    assert "| `random-initialized` | `pooled` | 25.0 ± 1.0 | 25.0 |" in text
    assert "| `constant answer` |  | 12.5 (2.5 – 22.5) | 12.5 |" in text
    assert "Margin over the best baseline: +25.0 points." in text
    assert 'mmssl.load("me/turns")' in text
    assert "timm.create_model(" in text
    parameters = sum(p.numel() for p in run.encoders["image"].parameters())
    assert f"| {parameters:,} | 16 |" in text
    assert ModelCard(text).data.license == "apache-2.0"
    recipe = re.search(r"```yaml\n(.*?)\n```", text, re.DOTALL)[1]
    assert validate(yaml.safe_load(recipe), "card") == publishable(run.recipe)


def test_metadata_are_those_that_the_hub_draws_a_table_of(run) -> None:
    data = ModelCard(model_card(with_recipe(run, license="mit"), "me/turns")).data
    assert data.model_name == "turns"
    found = {(one.metric_type, one.metric_name): one.metric_value for one in data.eval_results}
    asked = "knn probe of shape"
    assert found == {
        ("accuracy", f"accuracy ({asked}, pretrained pooled)"): 0.5,
        ("balanced_accuracy", f"balanced ({asked}, pretrained pooled)"): 0.5,
        ("accuracy", f"accuracy ({asked}, random-initialized pooled)"): 0.25,
        ("accuracy", f"accuracy ({asked}, constant answer)"): 0.125,
    }
    assert {(one.task_type, one.dataset_type, one.dataset_name) for one in data.eval_results} == {
        ("image-classification", "toy", "a fifth of toy")
    }
    again = eval_results_to_model_index(*model_index_to_eval_results(data.to_dict()["model-index"]))
    assert again == front_matter(model_card(run, "me/turns"))["model-index"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"test": "me/pets, split test"}, ("image-classification", "me/pets", "test")),
        ({"target": "labels", "test": "photos, split validation"}, ("image-classification", "photos", "validation")),
        ({"target": "values"}, ("image-feature-extraction", "toy", None)),
        ({"target": "masks"}, ("image-segmentation", "toy", None)),
        ({"target": "boxes"}, ("object-detection", "toy", None)),
        ({"target": "", "probe": "retrieval"}, ("image-feature-extraction", "toy", None)),
    ],
)
def test_tasks_and_data_have_the_names_of_the_hub(changes, expected) -> None:
    first = eval_results(Table.from_json(PROBES | changes), "image")[0]
    assert (first.task_type, first.dataset_type, first.dataset_split) == expected


def test_what_is_not_finite_is_no_result() -> None:
    tree = json.loads(json.dumps(PROBES))
    tree["rows"][0]["metrics"]["accuracy"] = math.nan
    names = [one.metric_name for one in eval_results(Table.from_json(tree), "image")]
    assert names[0].startswith("balanced")


def test_cost_is_that_of_the_records(run) -> None:
    records = [{"step": 0}, {"step": 10, "samples_per_second": 8.0}, {"step": 20, "samples_per_second": 0.5}]
    records[-1]["peak_memory_gib"] = 1.25
    said = "2.83 min of training, 4 samples a second, 1.2 GiB of memory a process at most"  # 10 s and 160 s
    assert cost(records, 8, []) == said
    machines = [Machine("CPU", 2), Machine("NVIDIA H200", 1)]
    assert cost(records, 8, machines) == f"{said}; 2 process(es) on CPU, then 1 process(es) on NVIDIA H200"
    assert cost([{"step": 5}], 8, []) == "not recorded"
    for machine in (machines[0], machines[0], machines[1]):
        keep_machine(run.directory, machine)
    assert run.machines == machines


def test_an_audit_is_said_with_its_arms_or_said_to_be_missing(run) -> None:
    assert "Not audited" in model_card(run)
    keep_audit(run.directory, Audited("at chance", "audit of rotation\n```\n  clean  white noise"))
    text = model_card(run)
    assert "where there is nothing to see: at chance." in text
    assert "audit of rotation\n```\n  clean  white noise" in fenced(text, "text")
    (run.directory / "audit.json").write_text("[1]")
    with pytest.raises(RunError, match=r"audit.json is damaged.*remove it"):
        model_card(run)
    (run.directory / "audit.json").unlink()


@pytest.mark.parametrize(
    ("test", "note", "public"),
    [
        ("/home/somebody/photos, split test", "3 rows of /home/somebody/x.csv", ["photos, split test", "x.csv"]),
        ("a fifth of /home/somebody/a b, held out", "and/or 1 / B", ["a fifth of a b, held out", "and/or 1 / B"]),
        ("https://me:pass@host/a.csv?token=1, split test", "", ["https://host/a.csv, split test"]),
        ("somebody/data, split test", "~/somebody/y", ["somebody/data, split test", "y"]),
        (r"C:\Users\somebody\photos, split test", "", ["photos, split test"]),
        ("toy, split test", "5 % of https://host/a/b", ["toy, split test", "https://host/a/b"]),
    ],
)
def test_tables_name_no_place_of_this_machine(test, note, public) -> None:
    found = public_table({**PROBES, "test": test, "warnings": [note]})
    assert found["test"] == public[0]
    assert found["warnings"][0].endswith(public[-1] if note else "")
    assert "/home" not in found["warnings"][0]
    assert found["rows"] == PROBES["rows"]


def test_no_license_and_no_probe_are_said(tmp_path) -> None:
    run = make_run(tmp_path / "run", ROTATION, probes=None)
    text = model_card(run)
    assert "license" not in front_matter(text)
    assert "## License\n\nNot stated." in text
    assert "Not measured" in text


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("for our lab only", {"license": "other", "license_name": "for our lab only"}),
        ("mit\nlibrary_name: evil", {"license": "other", "license_name": "mit library_name: evil"}),
    ],
)
def test_license_comes_from_the_recipe(run, stated, expected) -> None:
    meta = front_matter(model_card(with_recipe(run, license=stated)))
    assert {key: value for key, value in meta.items() if key.startswith("license")} == expected
    assert meta["library_name"] == "mmssl"


HOSTILE = "x\n---\nlicense: mit\n---\n# Forged\n```\n<script>alert(1)</script> | `` ` ``` {{ 7*7 }} {% raw %} \x1b[31m"


def test_hostile_names_stay_inside_their_place(run) -> None:
    plain = model_card(with_recipe(run, license=None, data={"source": "toy"}))
    tree = {**PROBES, "label": HOSTILE, "warnings": [HOSTILE]}
    (run.directory / "probes.json").write_text(json.dumps([tree, tree | {"probe": HOSTILE, "test": HOSTILE}]))
    text = model_card(with_recipe(run, data={HOSTILE: {"source": HOSTILE, "config": HOSTILE, "split": HOSTILE}}))
    (run.directory / "probes.json").write_text(json.dumps([PROBES]))
    found, honest = front_matter(text), front_matter(plain)
    assert not [word for word in strings(found.pop("model-index")) if not word.isprintable()]
    assert len(honest.pop("model-index")) == 1
    assert found == honest
    headings = [line for line in outside_fences(text) if line.startswith("#")]
    assert headings == [line for line in outside_fences(plain) if line.startswith("#")]
    assert not any("<script>" in re.sub(r"(`+).*?(?<!`)\1(?!`)", "", line) for line in outside_fences(text))
    assert "\x1b" not in "".join(outside_fences(text))
    assert validate(yaml.safe_load(fenced(text, "yaml")), "card") == publishable(run.recipe)


def strings(tree) -> list[str]:
    if isinstance(tree, dict | list):
        return [word for value in (tree.values() if isinstance(tree, dict) else tree) for word in strings(value)]
    return [tree] if isinstance(tree, str) else []


def outside_fences(text: str) -> list[str]:
    """Lines that Markdown reads as such: a fence is closed by as many backticks as opened it, or more."""
    kept, opened = [], ""
    for line in text.splitlines():
        ticks = re.match(r"`{3,}", line)
        if opened:
            if ticks and len(ticks[0]) >= len(opened) and not line[len(ticks[0]) :].strip():
                opened = ""
        elif ticks:
            opened = ticks[0]
        else:
            kept.append(line)
    return kept


def fenced(text: str, language: str) -> str:
    ticks = re.search(rf"^(`{{3,}}){language}$", text, re.MULTILINE)[1]
    return text.split(f"{ticks}{language}\n", 1)[1].split(f"\n{ticks}\n", 1)[0]


@pytest.mark.parametrize("text", ["plain", "a`b", "``", "`", "a\nb", "|"])
def test_code_spans_cannot_be_closed(text) -> None:
    span = code(text)
    ticks = re.match("`+", span)[0]
    assert span.endswith(ticks)
    inner = span[len(ticks) : -len(ticks)]
    assert all(len(run) != len(ticks) for run in re.findall("`+", inner))
    assert "\n" not in span


def test_fences_are_longer_than_what_they_hold() -> None:
    assert fence("a\n````\nb", "yaml").startswith("`````yaml\n")


def test_plain_text_has_no_markup() -> None:
    assert markdown("# a *b* [c](d) <e>") == r"\# a \*b\* \[c\](d) \<e\>"


def test_final_metrics_are_the_last_and_not_the_best() -> None:
    history = [{"step": 1, "loss": 1.0, "accuracy": 0.9, "lr": 1.0}, {"step": 2, "loss": 2.0, "probe/knn": 0.5}]
    assert final_metrics(history) == {"loss": 2.0, "accuracy": 0.9}


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("/home/somebody/photos", "photos"),
        ("/home/somebody/photos/", "photos"),
        ("~/photos", "photos"),
        ("../photos", "photos"),
        (r"C:\Users\somebody\photos", "photos"),
        ("file:///home/somebody/a.csv", "a.csv"),
        ("data/shards/*.tar", "*.tar"),
        ("https://name:secret@host/a/b.parquet?token=abc#x", "https://host/a/b.parquet"),
        ("user/name", "user/name"),
        ("toy", "toy"),
    ],
)
def test_private_places_are_not_published(source, public) -> None:
    tree = {**PAIRS, "data": {"source": source}, "probe": {"data": source}}
    recipe = publishable(validate(tree, "recipe"))
    assert (recipe.data.source, recipe.probe.data) == (public, public)


def test_existing_folders_are_local(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "photos").mkdir(parents=True)
    tree = {**PAIRS, "data": {"a": {"source": "own/photos"}, "b": {"source": "some/dataset"}}}
    recipe = publishable(validate(tree, "recipe"))
    assert [source.source for source in recipe.sources().values()] == ["photos", "some/dataset"]


def test_paths_of_encoders_are_private_too() -> None:
    encoders = {"image": {"model": "timm/resnet18", "pretrained": "/home/somebody/secret/weights.safetensors"}}
    recipe = publishable(validate({**ROTATION, "encoders": encoders}, "recipe"))
    assert recipe.encoders["image"] == {"model": "timm/resnet18", "pretrained": "weights.safetensors"}


def test_cells_of_tables_are_not_cut() -> None:
    assert cell("a|b`") == "`` a\\|b` ``"
