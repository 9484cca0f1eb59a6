"""Texts as they come, from files through the loader into the tasks: handled, or refused in one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made import write, write_jsonl, write_parquet

from mmssl.data.loader import Loader
from mmssl.decode_settings import TextDecode
from mmssl.encoders import create as encoder
from mmssl.errors import DataError
from mmssl.media.text import Tokenizer
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.recipe import Data

LONG = "a" * 100_000
ROWS = [
    "the cat sat",
    "  \t ",
    LONG,
    "word " * 20_000,
    "\U0001f600\U0001f9a9 猫が好き кот قطة cat",
    "!?!?",
    "\u200b",
    "the",
]
NEEDS = ("text", "text_word", "text_sentence")
WORDS = Tokenizer.train(["the cat sat on the mat"] * 2, 60)
SIZES = {"n_embd": 8, "n_layer": 1, "n_head": 2}
WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl}


def loader(where: Path, batch_size: int = 4, **changes) -> Loader:
    data = Data(source=str(where), text=TextDecode(length=12), shuffle_buffer=4, **changes)
    return Loader({"": data}, NEEDS, batch_size=batch_size, seed=1, tokenizers={"text": WORDS})


def task(name: str, **hyper):
    torch.manual_seed(0)
    return create(name, {"text": encoder("transformers/gpt2", "text", tokenizer=WORDS, **SIZES)}, **hyper)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_string_becomes_a_row(kind, streaming, tmp_path):
    WRITERS[kind](tmp_path / f"a.{kind}", {"text": ROWS})
    rows = list(loader(tmp_path, streaming=streaming).batches(0, 2))
    found = {int(i): batch["text"][n] for batch in rows for n, i in enumerate(batch["id"])}
    assert set(found) == set(range(len(ROWS)))
    for i, ids in found.items():
        assert torch.equal(ids, WORDS(ROWS[i], 12)[0])
    for batch in rows:
        assert batch["text_mask"][:, :2].all()
        assert (batch["text_word"].amax(1) <= batch["text_mask"].sum(1) - 2).all()


def test_empty_strings_are_rows_of_a_table_and_blank_lines_are_none(tmp_path):
    write_parquet(tmp_path / "table" / "a.parquet", {"text": ["", "", "the", "cat"]})
    (batch,) = loader(tmp_path / "table").batches(0, 1)
    assert batch["text_mask"][batch["id"] < 2].sum(1).tolist() == [2, 2]
    assert (batch["text_word"][batch["id"] < 2] == -1).all()
    write(tmp_path / "lines" / "a.txt", "the cat\n\n  \t\nsat\n" + LONG + "\nmat\n")
    (batch,) = loader(tmp_path / "lines").batches(0, 1)
    assert batch["text_mask"].sum(1).min() > 2
    with pytest.raises(DataError, match="has 4 usable rows, fewer than the batch of 5"):
        list(loader(tmp_path / "lines", batch_size=5).batches(0, 1))


TASKS = {
    "masked": ("masked_language", {}),
    "words": ("masked_language", {"unit": "word"}),
    "spans": ("masked_language", {"unit": "span"}),
    "bernoulli": ("masked_language", {"count": "bernoulli"}),
    "causal": ("causal_language", {}),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("texts", [ROWS, ["", " ", "\n", "\t"] * 2], ids=["hostile", "blank"])
def test_a_step_is_finite_and_leaves_finite_gradients(name, texts, tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": texts})
    kind, hyper = TASKS[name]
    objective = task(kind, **hyper)
    (batch,) = loader(tmp_path, batch_size=8).batches(0, 1)
    inputs = objective.transform(batch, Draws(0, 0, 8))
    losses = objective(inputs)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters())
    if texts is not ROWS and kind == "masked_language":
        assert not inputs["chosen"].any()
        assert losses["loss"] == 0
    objective.after_step(0.0)
    objective.preview(inputs, objective.predict(inputs))


@pytest.mark.parametrize("streaming", [False, True])
def test_bytes_that_are_no_text_are_named_with_the_way_out(streaming, tmp_path):
    broken = b"the cat\n\xff\xfe caf\xe9\nthe end\n"
    write(tmp_path / "text" / "a.txt", broken)
    write(tmp_path / "table" / "a.csv", b"text\n" + broken)
    write(tmp_path / "half" / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in ("cat", "half \ud83d", "x")))
    for name, words in (("text", r"UTF-8: `iconv"), ("table", r"UTF-8: `iconv"), ("half", r"cut a character in two")):
        with pytest.raises(DataError, match=rf"{name}.*cannot be read: .*{words}"):
            list(loader(tmp_path / name, batch_size=1, streaming=streaming).batches(0, 3))
