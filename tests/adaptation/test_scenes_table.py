"""scripts/scenes.py: what its table compares, how a learning rate is chosen, and what its oracle sees."""

from __future__ import annotations

import scenes
import torch


def key(*words: object) -> str:
    return " ".join(map(str, words))


def test_gains_are_over_the_same_seed_and_what_lacks_a_seed_is_left_out() -> None:
    cells = {}
    for seed, first in enumerate((0.2, 0.4, 0.6)):
        for way in ("frozen", "tuned"):
            cells[key("untrained figure", way, 20, seed)] = {"mean_iou": first, "constant": 0.1}
            if (way, seed) != ("frozen", 2):
                cells[key("simclr figure", way, 20, seed)] = {"mean_iou": first + 0.05}
    assert scenes.table(cells).split("\n") == [
        "| network | unit or ground, mIoU, 20 labels |",
        "|---|---|",
        "| untrained, frozen | 40.0 ± 20.0 |",
        "| from scratch | 40.0 ± 20.0 |",
        "| simclr, tuned | 45.0 ± 20.0 (+5.0 ± 0.0) |",
        "| true masks on 32 x 32 places |  |",
        "| constant answer | 10.0 |",
    ]


def test_learning_rates_are_chosen_without_a_look_at_test_scenes() -> None:
    low, high = scenes.RATES["figure", "tuned"]
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
