"""One call for a run, its path, an encoder and a task; what a recipe may ask for, and where the answers stand."""

import json

import pytest
import torch

import mmssl
from mmssl import Table
from mmssl.errors import RecipeError
from mmssl.hub.card import model_card
from mmssl.registry import components

RECIPE = {
    "encoders": {"image": {"model": "timm/test_resnet"}},
    "objective": {"name": "rotation"},
    "data": {"source": "toy", "limit": 96, "image": {"size": 16}},
    "training": {"steps": 2, "batch_size": 16, "log_every": 1},
}
PROBES = [
    {"label": "shape", "k": [9, 3], "every": 1, "limit": 64},
    {"probe": "ridge", "label": "colors", "limit": 64, "every": 1},
    {"probe": "finetune", "label": "position", "limit": 64, "steps": 2, "lr": [1e-3], "decay": [1.0], "shots": 32},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return mmssl.run(RECIPE | {"probes": PROBES}, out=tmp_path_factory.mktemp("models") / "run", quiet=True)


@pytest.mark.long
def test_a_run_its_path_its_encoder_and_its_task_give_one_table(run):
    common = {"label": "color", "probe": "ridge", "seeds": 1, "limit": 64}
    decoding = run.decoding("image")
    tables = [
        mmssl.adapt(run, "toy", **common),
        mmssl.adapt(run, **common),
        mmssl.adapt(run.directory, "toy", **common),
        mmssl.adapt(str(run.directory), encoder="image", **common),
        mmssl.adapt(run.objective, "toy", data=decoding, **common),
        mmssl.adapt(run.encoders["image"], "toy", data=decoding, **common),
    ]
    assert all(table.rows == tables[0].rows for table in tables)
    assert [table.encoder for table in tables] == ["image"] * 5 + [""]
    assert tables[0].row("random").metrics != tables[0].rows[0].metrics


@pytest.mark.long
def test_a_recipe_asks_for_several_probes_and_all_answers_are_kept(run):
    tables = {table["probe"]: Table.from_json(table) for table in run.probes}
    assert {name: table.target for name, table in tables.items() if name != "ridge"} == {
        "knn": "classes",
        "finetune": "values",
    }
    assert tables["knn"].rows[0].setting["k"] in (9, 3)
    assert tables["finetune"].shots == 32
    assert [t["label"] for t in run.probes[:3]] == ["shape", "colors", "position"]
    for record in run.history[1:]:
        assert {"probe/knn shape/accuracy", "probe/ridge colors/mean_average_precision_constant"} <= set(record)
    report, card = (run.directory / "report.html").read_text("utf-8"), model_card(run)
    for label in ("shape", "colors", "position"):
        assert f"probe of &#39;{label}&#39;" in report
        assert f"of the column `{label}`" in card
    assert "Not measured" not in card


@pytest.mark.long
def test_a_recipe_s_table_is_that_of_the_call(run):
    (stored,) = [table for table in run.probes if table["label"] == "shape"]
    again = mmssl.adapt(run, label="shape", k=(9, 3), limit=64)
    assert again.rows == Table.from_json(stored).rows


@pytest.mark.long
def test_tables_of_a_run_are_written_into_it_and_the_same_question_once(tmp_path):
    done = mmssl.run(RECIPE, out=tmp_path / "run", quiet=True)
    assert done.probes == []
    assert "Not measured" in model_card(done)
    asked = [{"label": "shape"}, {"label": "colors", "probe": "ridge"}, {"label": "shape", "seed": 4}]
    tables = [mmssl.adapt(done.directory, seeds=1, limit=64, **one) for one in asked]
    loaded = mmssl.load(done.directory)
    assert loaded.probes == [json.loads(json.dumps(table.to_json())) for table in (tables[2], tables[1])]
    assert "Not measured" not in model_card(loaded)
    assert "ridge probe of &#39;colors&#39;" in (tmp_path / "run" / "report.html").read_text("utf-8")
    # Every encoder once for each split, whatever was asked of it.
    assert len(list((tmp_path / "run" / "features").iterdir())) == 2 * 3
    mmssl.adapt(done, label="motion", seeds=1, limit=32, cache=False)
    assert len(list((tmp_path / "run" / "features").iterdir())) == 2 * 3


@pytest.mark.long
def test_a_run_in_the_cache_of_the_hub_stays_as_it_is(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mmssl.transfer.HF_HUB_CACHE", str(run.directory.parent))
    before = {path: path.stat().st_mtime_ns for path in run.directory.rglob("*")}
    mmssl.adapt(run, label="motion", seeds=1, limit=32)
    assert before == {path: path.stat().st_mtime_ns for path in run.directory.rglob("*")}


@pytest.mark.parametrize(
    ("probe", "sentence"),
    [
        ({"probe": "rigde"}, r"probe\.probe: there is no probe named 'rigde' \(did you mean 'ridge'"),
        ({"probe": "knn", "kk": [3]}, r"probe: unknown key 'kk'"),
        ({"labol": "shape"}, r"probe: unknown key 'labol' \(did you mean 'label'"),
        ({"probe": "ridge", "k": [3]}, r"probe: unknown key 'k' "),
        ({"k": "many"}, r"k = 'many' should be tuple\[int, ...\]"),
        ({"target": "clsses"}, r"probe\.target: there is no target named 'clsses' \(did you mean 'classes'"),
        ({"encoder": "imag"}, r"probe\.encoder: there is no encoder 'imag' \(did you mean 'image'"),
        ({"probe": "finetune", "every": 5}, r"probe\.every: finetune is not asked during training"),
        ({"every": -1}, r"probe\.every = -1"),
    ],
)
def test_mistakes_in_a_probe_are_named_before_anything_is_made(tmp_path, probe, sentence):
    with pytest.raises(RecipeError, match=sentence):
        mmssl.run(RECIPE | {"probe": probe}, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_one_probe_or_several_but_not_both(tmp_path):
    with pytest.raises(RecipeError, match="probe and probes are both given"):
        mmssl.run(RECIPE | {"probe": {}, "probes": [{}]}, out=tmp_path / "run", quiet=True)
    with pytest.raises(RecipeError, match=r"probes\.1: unknown key 'kk'"):
        mmssl.run(RECIPE | {"probes": [{}, {"kk": 1}]}, out=tmp_path / "run", quiet=True)
    probes = [{"label": "shape", "every": 1}, {"label": "color", "every": 2}]
    with pytest.raises(RecipeError, match="every is not the same"):
        mmssl.run(RECIPE | {"probes": probes}, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_options_can_be_set_from_the_command_line():
    from mmssl import recipe

    loaded = recipe.load(RECIPE, {"probe.probe": "finetune", "probe.steps": "100", "probe.lr": "[3e-4]"})
    assert loaded.probe.options == {"steps": 100, "lr": ["3e-4"]}
    assert recipe.load(loaded.model_dump(mode="json", exclude_none=True)) == loaded


@pytest.mark.long
def test_networks_that_a_probe_cannot_take_are_named(run):
    with pytest.raises(RecipeError, match=r"give the task: run\.objective"):
        mmssl.adapt(run.encoders["image"], "toy", probe="retrieval")
    with pytest.raises(RecipeError, match="Rotation compares no two encoders"):
        mmssl.adapt(run, probe="retrieval")
    with pytest.raises(RecipeError, match="leave the name out"):
        mmssl.adapt(run.encoders["image"], "toy", encoder="image")
    with pytest.raises(RecipeError, match=r"no encoder 'imag' \(did you mean 'image'"):
        mmssl.adapt(run, encoder="imag")


def test_every_target_is_found_by_name():
    assert {"classes", "labels", "values"} <= set(components("target"))


@pytest.mark.long
def test_a_probe_during_training_leaves_the_training_as_it_was(tmp_path):
    plain = mmssl.run(RECIPE, out=tmp_path / "plain", quiet=True)
    probe = {"label": "shape", "every": 1, "limit": 48}
    probed = mmssl.run(RECIPE | {"probe": probe}, out=tmp_path / "probed", quiet=True)
    assert {"probe/accuracy", "probe/accuracy_constant"} <= set(probed.history[1])
    for name, value in plain.objective.state_dict().items():
        assert torch.equal(value, probed.objective.state_dict()[name])
