"""scripts/scenes.py: what its table compares, how a learning rate is chosen, and what its oracle sees."""

from __future__ import annotations

import scenes
import torch


def key(*words: object) -> str:
    return " ".join(map(str, words))


def test_gains_are_over_the_same_seed_and_a_line_waits_for_all_its_cells() -> None:
    cells = {}
    for (question, way), counts in scenes.ASKED.items():
        for labels in counts:
            for seed, first in enumerate((0.2, 0.4, 0.6)):
                cells[key("untrained", question, way, labels, seed)] = {"mean_iou": first, "constant": 0.1}
                if (way, seed) != ("frozen", 2):
                    cells[key("simclr", question, way, labels, seed)] = {"mean_iou": first + 0.05}
    rows = {cells[1].strip(): cells for cells in (row.split("|") for row in scenes.table(cells).split("\n"))}
    assert rows["simclr, tuned"][2].strip() == "45.0 ± 20.0 (+5.0 ± 0.0)"
    assert rows["simclr, frozen"][2].strip() == "35.0 ± 14.1 (+5.0 ± 0.0)"
    assert rows["simclr, frozen"][-2].strip() == "2"
    assert rows["from scratch"][2].strip() == "40.0 ± 20.0"
    assert rows["constant answer"][2].strip() == "10.0"
    assert "densecl, tuned" not in rows


def test_learning_rates_are_chosen_without_a_look_at_test_scenes() -> None:
    low, high = scenes.RATES["tuned"]
    wanted = {one[1:3] for one in scenes.choices("simclr")}
    assert wanted == {("figure", "frozen"), ("figure", "tuned"), ("mask", "frozen")}
    cells = {key(*one): {"mean_iou": one[-1]} for one in scenes.choices("simclr")}
    cells[key("simclr", "mask", "tuned", 1000, 0)] = {"mean_iou": 1.0}
    assert scenes.chosen(cells, "simclr", "mask", "tuned") == high
    cells[key("simclr", "figure", "tuned", scenes.CHOSEN_WITH, 0, low)] = {"mean_iou": 1.0}
    assert scenes.chosen(cells, "simclr", "mask", "tuned") == low


def test_the_oracle_says_which_share_of_a_place_is_of_which_class() -> None:
    mask = torch.randint(0, 10, (2, scenes.SIZE, scenes.SIZE), dtype=torch.uint8)
    (batch,) = scenes.painted([{"image": torch.zeros(2, 3, 1, 1), "mask": mask}])
    (places,) = scenes.oracle().layers(batch["image"]).values()
    assert places.grid == (32, 32)
    shares = places.tokens.unflatten(1, places.grid)
    block = mask[1, 6:8, 10:12].flatten().tolist()
    assert (4 * shares[1, 3, 5]).tolist() == [block.count(number) for number in range(10)]
