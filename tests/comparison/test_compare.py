"""A comparison from end to end, on the toy world with next to no training."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

import mmssl
from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.features import features
from mmssl.adaptation.labeled import Question
from mmssl.adaptation.probes import make_probe
from mmssl.adaptation.request import Model
from mmssl.adaptation.rows import open_rows
from mmssl.comparison.cells import cells_of, factor_of, read_cell
from mmssl.comparison.files import keep_audits
from mmssl.comparison.measure import Cell, request_of, untrained_encoder
from mmssl.comparison.monitors import look
from mmssl.comparison.page import write_page
from mmssl.comparison.plan import make_plan
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.hub.card import model_card
from mmssl.recipe import Data
from mmssl.run_directory import Audited

pytestmark = pytest.mark.long
TOY = Data(source="toy", limit=128)
FEW = {
    "label": "shape",
    "tasks": ["rotation", "simclr"],
    "encoder": {"model": "timm/test_resnet"},
    "budget": "steps=4",
    "batch": 16,
    "seeds": 2,
    "size": 32,
    "probe": "ridge",  # in closed form
    "shots": ["50%", 4],
    "rates": [1.0, 3.0],
    "limit": 100,
    "audit": False,
    "quiet": True,
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> mmssl.Comparison:
    return mmssl.compare(TOY, out=tmp_path_factory.mktemp("compare") / "all", **FEW)


def test_every_line_has_every_seed_and_measure(compared):
    assert {line: len(cells) for line, cells in compared.cells.items()} == {
        "rotation": 2,
        "simclr": 2,
        "untrained": 2,
        "raw input": 1,
        "supervised": 2,
    }
    assert compared.measures == ["knn", "ridge, 4 a class", "ridge, 50 % of labels"]  # the fewest first
    assert compared.main == "ridge, 4 a class"
    head, lines = compared.table()
    assert next(title for title in head if "50 %" in title) == "ridge, 50 % of labels (50 rows)"
    assert [line[0] for line in lines][2:] == ["untrained", "raw input", "supervised, same budget", "constant answer"]
    assert all(len(line) == len(head) for line in lines)
    gain = compared.difference(compared.ranked[0], "untrained", compared.main)
    assert ("or mmssl export" in compared.sentence) == (gain.told and gain.mean > 0)


@pytest.mark.parametrize("line", ["rotation", "simclr"])
def test_untrained_is_where_each_task_began(compared, line):
    untrained = dict(untrained_encoder(compared.plan, 1).named_parameters())
    still = {"training.steps": 1, "training.optimizer.lr": 1e-12, "training.schedule.warmup": 0}
    run = mmssl.run(mmssl.load(compared.cells[line][1]["run"]).recipe, still, out=compared.out / line, quiet=True)
    began = dict(run.encoders["image"].named_parameters())
    assert began.keys() == untrained.keys()
    for name, value in untrained.items():
        torch.testing.assert_close(began[name], value, atol=1e-8, rtol=0)


def test_all_tasks_cost_the_same(compared):
    samples = {line: cells[0]["cost"]["samples"] for line, cells in compared.cells.items() if "cost" in cells[0]}
    assert samples == {"rotation": 64, "simclr": 64, "supervised": 64}


def test_rates_are_those_of_the_best_validation_score(compared):
    plan = compared.plan
    for line in ("rotation", "simclr", "supervised"):
        assert compared.cells[line][0]["lr"] > 0
        scores = {rate: read_cell(compared.out, Cell(line, 0, rate))["validation"] for rate in plan.rates}
        assert scores[factor_of(plan, line, compared.out)] == max(scores.values())


def test_the_best_depth_is_that_of_validation_rows_not_of_test_rows(compared):
    compared = mmssl.Comparison.read(compared.out)
    cells = compared.cells["simclr"]
    measure = compared.main
    judge = compared.judge(measure)
    validation = {d: np.mean([c["validation"][judge][d] for c in cells]) for d in cells[0]["validation"][judge]}
    assert validation[compared.depth("simclr", measure)] == max(validation.values())
    for cell in cells:
        cell["scores"][measure] = dict.fromkeys(cell["scores"][measure], 0.0)
    assert validation[compared.depth("simclr", measure)] == max(validation.values())


def test_labels_too_few_to_choose_by_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RecipeError, match=r"shots = 1%: of \d+ rows no class has two, and ridge chooses its settings"):
        mmssl.compare(TOY, out=tmp_path / "all", **{**FEW, "shots": [4, "1%"], "tasks": ["rotation"]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("label", ["hue", "position"])
def test_labels_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, label):
    with pytest.raises((DataError, RecipeError), match=label):
        mmssl.compare(TOY, out=tmp_path / "all", **{**FEW, "label": label, "target": "classes", "tasks": ["rotation"]})
    assert not list(tmp_path.iterdir())


def test_a_comparison_that_was_cut_short_ends_in_the_same_table(compared):
    again = mmssl.Comparison.read(compared.out)
    table, sentence = again.table(), again.sentence
    kept = {cell.name: read_cell(compared.out, cell) for cell in cells_of(again.plan)}
    for name in ("simclr-1", "untrained-0", "rotation-rate-x3"):
        shutil.rmtree(compared.out / "cells" / name)
    assert "of 9 cells are there" in mmssl.Comparison.read(compared.out).notes()[0]
    done = mmssl.compare(out=compared.out, quiet=True)
    for cell in cells_of(done.plan):
        found = read_cell(compared.out, cell)
        for key in ("scores", "validation", "monitors", "factor"):
            assert found.get(key) == kept[cell.name].get(key)
    assert [line[:6] for line in done.table()[1]] == [line[:6] for line in table[1]]
    assert done.sentence == sentence


def test_what_needs_no_labels_stands_next_to_what_does(compared):
    head, lines = compared.table()
    assert "audit" not in head  # nor is it read as one that found nothing
    assert any(note.startswith("no task was audited") for note in compared.notes())
    places = [[line[head.index(name)] for line in lines[:2]] for name in ("RankMe", "LiDAR", "alpha-ReQ")]
    assert all(sorted(cell.split()[1] for cell in cells) == ["(1)", "(2)"] for cells in places)
    raw = next(line for line in lines if line[0] == "raw input")
    assert (raw[head.index("RankMe")] != "", raw[head.index("LiDAR")]) == (True, "")
    assert "agreement with probes of rankings without labels takes three tasks that differ" in str(compared)
    three = mmssl.Comparison.read(compared.out)
    three.__dict__["ranked"] = ["rotation", "simclr", "untrained"]  # as if that were a task, too
    head, lines = three.table()
    assert (lines[-1][0], len(lines[-1])) == ("agreement with probes", len(head))
    assert re.fullmatch(r"[+-]\d\.\d\d", lines[-1][head.index("LiDAR")])
    assert re.search(r"RankMe [+-]\d\.\d\d \(Spearman [+-]\d\.\d\d, p = \d\.\d\d, 3 tasks\)", str(three))


def test_views_are_the_same_for_every_encoder_and_a_blind_one_tells_no_rows_apart(compared):
    plan = compared.plan
    encoder = untrained_encoder(plan, 0)
    answered = {}
    first = look(plan, encoder, answered, first=True)
    assert first == look(plan, encoder, {}) == compared.cells["untrained"][0]["monitors"]
    assert len(answered["map"]) == 100
    assert answered["neighbors"].shape[:2] == (6, 6)  # without labels, too
    for parameter in encoder.parameters():
        parameter.data.zero_()
    assert look(plan, encoder, {})["lidar"] == 1


def test_rows_that_probes_have_read_are_not_encoded_again(compared, tmp_path, monkeypatch):
    plan, encoder, cache = compared.plan, untrained_encoder(compared.plan, 0), FeatureCache(tmp_path)
    request = request_of(plan, Cell("untrained", 0), layers=True, cache=cache)
    make_probe("knn", {}).score(Model.of(encoder), request)
    module = importlib.import_module("mmssl.adaptation.features")
    monkeypatch.setattr(module, "depths_of", lambda *_: pytest.fail("rows are encoded again"))
    question = Question.of(Model.of(encoder), request)
    found = look(plan, encoder, {}, question=question, cache=cache, first=True)
    assert found == compared.cells["untrained"][0]["monitors"]


@pytest.mark.parametrize("kind", ["PCA", "t-SNE"])
def test_a_map_says_how_it_was_made_and_without_opentsne_is_that_of_pca(compared, monkeypatch, kind):
    if kind == "t-SNE":
        pytest.importorskip("openTSNE")
    real, missing = importlib.util.find_spec, "openTSNE" if kind == "PCA" else ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else real(name, *rest))
    answered, encoder = {}, untrained_encoder(compared.plan, 0)
    look(compared.plan, encoder, answered, first=True)
    assert str(answered["map_kind"]) == kind
    reads = Model.of(encoder).reads(("image",), 0)
    x, _, _ = features(encoder, open_rows(compared.plan.rows, reads, None, None, 100, "train").read())
    flat = PCA(2).fit_transform(x.double().numpy())
    likeness = np.abs(np.corrcoef(answered["map"].T, flat.T)[:2, 2:]).diagonal()
    assert (likeness > 0.999).all() == (kind == "PCA")


def test_it_is_written_in_four_forms(compared):
    compared = mmssl.Comparison.read(compared.out)
    assert compared.markdown() in (compared.out / "table.md").read_text()
    rows = pq.read_table(compared.out / "table.parquet").to_pylist()
    assert len(rows) == len((compared.out / "table.csv").read_text().splitlines()) - 1
    (one,) = [r for r in rows if (r["line"], r["seed"], r["measure"], r["depth"]) == ("untrained", 1, "knn", "pooled")]
    assert one["score"] == compared.values("untrained", "knn", "pooled")[1]


def test_intervals_are_drawn_once_for_table_and_sentence(compared, monkeypatch):
    drawn = []
    monkeypatch.setattr("mmssl.comparison.measured.paired_interval", lambda *args: drawn.append(args) or (0.0, 1.0))
    found = mmssl.Comparison.read(compared.out)
    assert str(found) == str(found)
    assert len(drawn) == 4 + 2  # lines less the untrained network, and the best task less the other one and raw input


def test_a_folder_holds_one_comparison(compared):
    with pytest.raises(RunError, match="holds a comparison with other seeds; choose another --out"):
        mmssl.compare(TOY, out=compared.out, **{**FEW, "seeds": 1})


def test_runs_that_are_there_are_compared_as_they_are(compared, tmp_path):
    runs = [compared.cells[line][seed]["run"] for line in ("rotation", "simclr") for seed in (0, 1)]
    few = {key: FEW[key] for key in ("label", "probe", "shots", "rates", "limit", "audit", "quiet")}
    found = mmssl.compare(TOY, runs=runs, out=tmp_path / "runs", **few)
    assert found.plan.runs == {"rotation": runs[:2], "simclr": runs[2:]}
    for line in ("rotation", "simclr"):
        same = json.loads((compared.out / "cells" / f"{line}-1" / "cell.json").read_text())["scores"]
        assert found.cells[line][1]["scores"] == same
        assert found.cells[line][0]["cost"]["samples"] == 64
    assert list(found.cells) == ["rotation", "simclr", "untrained", "raw input", "supervised"]
    assert [cell["cost"]["samples"] for cell in found.cells["supervised"]] == [64, 64]
    assert "the supervised network learned in 4 steps of 16 encoder samples, as the runs did" in str(found)
    assert "learning rate of the supervised network: 0.001 times 1, 3, by kNN" in str(found)
    assert "encoder samples a step" not in str(found)


def test_without_labels_the_rank_of_features_is_all_there_is(tmp_path):
    settings = {key: value for key, value in FEW.items() if key != "label"} | {"tasks": ["rotation"], "seeds": 1}
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    found = mmssl.compare(str(folder), out=tmp_path / "out", **settings)
    assert found.measures == []
    assert list(found.cells) == ["rotation", "untrained", "raw input"]
    assert re.match(r"Without labels rotation comes first by RankMe \([\d.]+\), LiDAR \([\d.]+\)", found.sentence)
    assert "labels of a hundred rows would" in found.sentence


def test_classes_of_folders_are_the_labels_and_what_does_not_fit_is_said(tmp_path):
    plan = make_plan(TOY, label="shape", budget="steps=4", batch=32, encoder="timm/test_resnet", size=32)
    assert {"rotation", "jigsaw", "simclr", "byol", "dino", "colorization"} <= set(plan.tasks)
    assert "masked_autoencoder" not in plan.tasks
    assert any(note.startswith("masked autoencoder is left out: ") for note in plan.notes)
    assert plan.modality == "image"
    with pytest.raises(RecipeError, match="masked_autoencoder"):
        make_plan(TOY, label="shape", tasks=["masked_autoencoder"], encoder="timm/test_resnet")
    with pytest.raises(RecipeError, match="did you mean"):
        make_plan(TOY, label="shape", tasks=["rotatoin"])


def test_the_page_holds_everything_in_one_file(compared):
    page = write_page(mmssl.Comparison.read(compared.out)).read_text()
    assert "http" not in page
    titles = re.findall("<h2>(.*?)</h2>", page)
    puzzles = [f"Puzzles of {line}" for line in compared.ranked]
    assert titles[:2] == ["Over the untrained network", "Which depth transfers best"]
    assert titles[2:4] == ["Rankings without labels", "The pretext tasks"]
    assert titles[4:] == [*puzzles, "Nearest neighbors", "Maps of the features", "What is taken for what"]
    assert page.count("data:image/png;base64,") == len(titles) + 1  # neighbors of the best task and of the untrained
    captions = re.findall("<figcaption>(.*?): \\d+ of 30 have the same label</figcaption>", page)
    assert captions == [compared.ranked[0], "untrained"]
    assert "is the best depth on validation rows; on test rows it is" in page
    assert compared.sentence.split(".")[0] in page


def test_confusions_are_shares_of_each_class(compared):
    found = mmssl.Comparison.read(compared.out)
    shares, names = found.confusion("simclr", found.main)
    assert shares.shape == (len(names), len(names))
    present = shares.sum(1) > 0
    np.testing.assert_allclose(shares.sum(1)[present], 1)
    truth = np.concatenate([one["truth"] for one in found.answers["simclr"]])
    weights = np.bincount(truth, minlength=len(names)) / len(truth)
    assert (shares.diagonal() * weights).sum() == pytest.approx(np.mean(found.values("simclr", found.main)))


def test_rows_that_are_held_out_are_the_same_for_all_lines_and_seeds(tmp_path):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(random.integers(15, 30)):
            pixels = random.integers(0, 256, (36, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    settings = FEW | {"label": None, "tasks": ["rotation"], "rates": [1.0], "supervised": True}
    found = mmssl.compare(str(tmp_path / "photos"), out=tmp_path / "out", **settings)
    truths = [answers["truth"] for line in found.answers.values() for answers in line]
    tested = [cell["rows"][found.main] for cells in found.cells.values() for cell in cells]
    assert len(truths) == 7
    assert all(np.array_equal(truth, truths[0]) for truth in truths)
    assert all(rows == tested[0] for rows in tested)
    assert "the tasks saw the test rows, without labels" in str(found)
    plan = found.plan
    splits = [
        Question.of(Model.of(untrained_encoder(plan, 0)), request_of(plan, Cell(line, seed)))
        for line, seed in (("rotation", 0), ("rotation", 1), ("supervised", 1))
    ]
    assert all(torch.equal(one.test.ids, splits[0].test.ids) for one in splits)


def test_a_task_is_audited_and_the_table_says_what_came_out(tmp_path):
    few = {**FEW, "tasks": ["autoencoder"], "seeds": 1, "rates": [1.0], "supervised": False, "audit": True}
    found = mmssl.compare(TOY, out=tmp_path / "audited", **few)
    head, lines = found.table()
    assert [line[head.index("audit")] for line in lines] == ["clean by gradients", "", "", ""]
    assert found.audits["autoencoder"]["text"].startswith("audit of autoencoder")
    assert found.audits["autoencoder"]["sentence"] in (tmp_path / "audited" / "report.html").read_text()
    run = mmssl.load(tmp_path / "audited" / "runs" / "autoencoder-0")
    assert run.audit == Audited(found.audits["autoencoder"]["verdict"], found.audits["autoencoder"]["text"])
    assert "Not audited" not in model_card(run)
    left = replace(
        found, audits={"autoencoder": {"verdict": "leaks", "sentence": "autoencoder can be answered", "text": ""}}
    )
    keep_audits(left)
    assert mmssl.load(run.directory).audit == run.audit  # what is there stays
    assert "audit: autoencoder can be answered" in left.notes()
