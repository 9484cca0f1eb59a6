"""Do tasks on text learn more than counting does? Definitions and sentences in five languages; resumable.

    MMSSL_DATA=path/to/data python scripts/compare_text.py                      every missing cell, then the tables
    MMSSL_DATA=path/to/data python scripts/compare_text.py masked_language 0 1  some tasks or seeds
    python scripts/compare_text.py --table                                      only the tables, into docs/results.md

A cell is one task on one corpus with one seed, kept in scripts/compare_text.json and not run again. Each is scored on
texts that were not trained on, at the tokens that it cannot see: masked language modeling where the text shows the
mask token, span denoising at the removed tokens (not at sentinels and the end). With them are models that count the
training texts. `unigram` knows how frequent a token is; `bigram` what follows the token to the left; `both neighbors`,
for the masks, what follows the left one and precedes the right one, P(token | left) P(right | token) normalized, which
is the exact answer of a bigram model. Bigrams are smoothed by absolute discounting with the unigrams; where a neighbor
is hidden too, they do without it. The decoder of span denoising knows a span's earlier tokens, and so does its bigram.
All are asked which token it is, given that it is one of a text: chances of sentinels, of the end and of the other
special tokens are taken out and the rest made to add up, the network's as well as the counts'. That a span goes on is
nothing that counts of whole texts could say.

Then the class of the noun that a definition of WordNet defines (25 classes, 10 and 100 labels a class) is read off the
frozen encoder by logistic regression, with the same network random-initialized and TF-IDF of the words.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tables import Cells, fill_cells, read_cells, spread, write_tables

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "scripts" / "compare_text.json"
SEEDS = (0, 1, 2)
TASKS = ("masked_language", "span_denoising")
CORPORA = ("wordnet", "stamps")
# What differs from the tasks' recipes, which are those of WordNet: 2,701 sentences are soon known by heart. Chosen on
# validation rows.
STAMPS = {
    "data.source": "$MMSSL_DATA/stamps",
    "encoders.text.tokenizer": "train:3000",
    "training.steps": 600,
    "training.save_every": 600,
}
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("stamps", "masked_language"): STAMPS,
    ("stamps", "span_denoising"): {**STAMPS, "encoders.text.dropout": 0.3, "training.optimizer.weight_decay": 1.0},
}
TFIDF = "TF-IDF of words"
SHOTS = (10, 100)
DISCOUNT = 0.75
HELD_OUT = 4096
NOUNS = {"train": 12000, "test": 4000}


def measure(corpus: str, task: str, seed: int) -> dict[str, Any]:
    """Numbers of one cell: losses at hidden tokens of unseen texts, and for WordNet the probe."""
    import torch

    import mmssl

    torch.set_num_threads(1)
    began = time.perf_counter()
    if task == TFIDF:
        return _tfidf(seed)
    with tempfile.TemporaryDirectory() as out:
        recipe = ROOT / "recipes" / "reconstruction" / f"{task}_wordnet.yaml"
        changes = {"training.seed": seed, **CHANGES.get((corpus, task), {})}
        run = mmssl.run(recipe, set=changes, out=Path(out) / "run", quiet=True)
    cell: dict[str, Any] = {"trained": round((time.perf_counter() - began) / 60, 2), **losses(run)}
    if corpus == "wordnet":
        train, test = _nouns()
        for shots in SHOTS:
            scores = mmssl.adapt(
                run.encoders["text"],
                train,
                test,
                label="category",
                probe="logistic",
                shots=shots,
                seed=seed,
                seeds=1,
                data=run.recipe.data,
            )
            for row in scores.rows:
                cell.setdefault(row.encoder, {})[str(shots)] = round(row.metrics["accuracy"], 4)
    return cell | {"minutes": round((time.perf_counter() - began) / 60, 2)}


class Counts:
    """Models that count: how frequent each token is, and what follows it.

    Args:
        special: bool (V,), the tokens that are never hidden; the models give them no chance.
        discount: what each pair seen is taken off for pairs never seen, which share it as the tokens are frequent.
    """

    def __init__(self, special: np.ndarray, discount: float = DISCOUNT) -> None:
        self.special, self.discount = special, discount
        self.pairs = np.zeros((len(special), len(special)), dtype=np.float32)

    def see(self, text: np.ndarray) -> None:
        """Count the tokens of one text, start and end included, (N,)."""
        np.add.at(self.pairs, (text[:-1], text[1:]), 1)

    def fit(self) -> Counts:
        """Turn counts into probabilities."""
        count = self.pairs.sum(0) + 1
        self.unigram = count * ~self.special / count[~self.special].sum()
        kept = np.maximum(self.pairs - self.discount, 0) / np.maximum(self.pairs.sum(1, keepdims=True), 1)
        self.follows = kept + (1 - kept.sum(1, keepdims=True)) * count / count.sum()  # P(column | row)
        return self

    def chances(self, left: int | None, right: int | None) -> dict[str, np.ndarray]:
        """Each model's chances of all V tokens between two others, None where one is not known."""
        on_left = self.unigram if left is None else self.follows[left]
        models = {
            "unigram": self.unigram,
            "bigram": on_left,
            "both neighbors": on_left if right is None else on_left * self.follows[:, right],
        }
        return {name: chance * ~self.special / chance[~self.special].sum() for name, chance in models.items()}


def losses(run: Any) -> dict[str, float]:
    """Mean surprise in nats at the hidden tokens of unseen texts: the network's, and that of models that count."""
    import torch
    import torch.nn.functional as F

    from mmssl.data.loader import read
    from mmssl.ops.draws import Draws

    (data,) = run.recipe.sources().values()
    task, tokenizer = run.objective.eval(), run.tokenizers["text"]
    special = np.isin(np.arange(tokenizer.vocab_size), sorted({*tokenizer.special_ids, *tokenizer.sentinel_ids}))
    counts = Counts(special)
    for batch in read(data, ("text",), tokenizers=run.tokenizers):
        for row, mask in zip(batch["text"].numpy(), batch["text_mask"].numpy(), strict=True):
            counts.see(row[mask])
    counts.fit()

    sums: dict[str, float] = {}
    tokens = 0
    held_out = data.model_copy(update={"split": "test", "limit": HELD_OUT})
    for step, batch in enumerate(read(held_out, task.needs, tokenizers=run.tokenizers)):
        with torch.no_grad():
            inputs = task.transform(batch, Draws(0, step, len(batch["id"])))
            logits = task.logits(inputs)
        span = "target_mask" in inputs
        hidden = (removed_tokens if span else masked_tokens)(inputs, tokenizer)
        asked = inputs["target_mask" if span else "chosen"]
        words = logits[:, : len(special)].masked_fill(torch.from_numpy(special), -math.inf)
        nats = F.cross_entropy(words, inputs["target"][asked], reduction="none")
        surprise = torch.zeros(asked.shape).masked_scatter(asked, nats)
        for row, place, target, left, right in hidden:
            found = {name: -math.log(chance[target]) for name, chance in counts.chances(left, right).items()}
            for name, own in {"network": float(surprise[row, place]), **found}.items():
                sums[name] = sums.get(name, 0.0) + own
            tokens += 1
    if span:
        del sums["both neighbors"]  # where the span ends is not known yet
    return {name: round(total / tokens, 4) for name, total in sums.items()} | {"tokens": tokens}


Hidden = Iterator[tuple[int, int, int, int | None, int | None]]
"""Row and place of the logits, the token that is hidden there, and the tokens next to it as far as they are known."""


def masked_tokens(inputs: Any, tokenizer: Any) -> Hidden:
    """Tokens of masked language modeling that the text shows as the mask token."""
    for row, slot in inputs["chosen"].nonzero().tolist():
        place = int(inputs["places"][row, slot])
        left, own, right = (int(token) for token in inputs["text"][row, place - 1 : place + 2])
        if own == tokenizer.mask_id:
            seen = (None if token == tokenizer.mask_id else token for token in (left, right))
            yield row, slot, int(inputs["target"][row, slot]), *seen


def removed_tokens(inputs: Any, tokenizer: Any) -> Hidden:
    """Tokens of span denoising that were removed; to the left of a span's first one is what is before its gap."""
    sentinels = set(tokenizer.sentinel_ids)
    for row, (target, said) in enumerate(zip(inputs["target"], inputs["target_mask"], strict=True)):
        shown = inputs["text"][row].tolist()
        left = None
        for place, token in enumerate(target[said].tolist()):
            if token in sentinels:
                gap = shown.index(token)
                left = None if gap == 0 or shown[gap - 1] in sentinels else shown[gap - 1]
            elif token not in tokenizer.special_ids:
                yield row, place, token, left, None
                left = token


def _nouns() -> Any:
    """Definitions of nouns to learn from and to be asked for; 25 classes."""
    import datasets

    files = {split: f"{os.environ['MMSSL_DATA']}/wordnet/{split}.parquet" for split in NOUNS}
    nouns = datasets.load_dataset("parquet", data_files=files).filter(
        lambda row: row["category"].startswith("noun.") and row["category"] != "noun.Tops"
    )
    return tuple(nouns[split].shuffle(seed=0).select(range(rows)) for split, rows in NOUNS.items())


def _tfidf(seed: int) -> dict[str, Any]:
    """The probe's protocol on sparse words: the same draw of labels, C chosen on a fifth of them."""
    import datasets
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from mmssl.adaptation.targets.base import HELD_OUT as SHARE
    from mmssl.adaptation.targets.classes import Classes

    train, test = _nouns()
    home = f"{os.environ['MMSSL_DATA']}/wordnet/train.parquet"
    every = datasets.load_dataset("parquet", data_files=home, split="train")["text"]
    words = TfidfVectorizer(sublinear_tf=True).fit(every)
    known, asked = words.transform(train["text"]), words.transform(test["text"])
    classes = sorted(set(train["category"]))
    target = Classes(classes)
    labels = target.encode(train["category"])
    truth = np.array([classes.index(name) for name in test["category"]])
    found = {}
    for shots in SHOTS:
        pick = target.draw_shots(labels, shots, seed)
        rows, own = known[pick.numpy()], labels[pick]
        held = target.hold_out(own, SHARE, seed).numpy()
        accuracy = {
            c: LogisticRegression(C=c, max_iter=2000).fit(rows[~held], own[~held]).score(rows[held], own[held])
            for c in (0.1, 1.0, 10.0, 100.0)
        }
        best = LogisticRegression(C=max(accuracy, key=lambda c: accuracy[c]), max_iter=2000).fit(rows, own)
        found[str(shots)] = round(float(best.score(asked, truth)), 4)
    return {"pretrained": found}


def tables(cells: Cells) -> str:
    """Markdown: the losses, then the probe; mean and standard deviation over the seeds."""
    lines = [
        "| unseen texts, nats a hidden token | network | unigram | bigram | both neighbors | tokens | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    probes = [
        f"| class of the noun, right of 25 | {' | '.join(f'{shots} labels a class' for shots in SHOTS)} | seeds |",
        "|---|---|---|---|",
    ]
    for corpus in CORPORA:
        for task in (*TASKS, TFIDF):
            runs = [cell for key, cell in cells.items() if key.rpartition(" ")[0] == f"{corpus} {task}"]
            name = f"{corpus}: `{task}`"
            if runs and "network" in runs[0]:
                columns = [
                    spread([run[model] for run in runs], 2) if model in runs[0] else ""
                    for model in ("network", "unigram", "bigram", "both neighbors")
                ]
                lines.append(f"| {name} | {' | '.join(columns)} | {runs[0]['tokens']} | {len(runs)} |")
            for encoder in ("pretrained", "random"):
                if runs and encoder in runs[0]:
                    right = [spread([100 * run[encoder][str(shots)] for run in runs]) for shots in SHOTS]
                    what = task if task == TFIDF else f"`{task}`" if encoder == "pretrained" else "the same, untrained"
                    probes.append(f"| {what} | {' | '.join(right)} | {len(runs)} |")
    return "\n".join([*lines, "", *probes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"tasks, corpora and seeds: {', '.join([*TASKS, *CORPORA])}")
    parser.add_argument("--table", action="store_true", help="only the tables, into docs/results.md")
    parser.add_argument("--workers", type=int, default=2, help="cells side by side, one thread each; 2 by default")
    given = parser.parse_args()
    known = [*TASKS, *CORPORA]
    if unknown := [word for word in given.what if word not in known and not word.isdigit()]:
        parser.error(f"there is no '{unknown[0]}' here; there are {', '.join(known)}")
    if not given.table:
        tasks = [word for word in given.what if word in TASKS] or [*TASKS, TFIDF]
        corpora = [word for word in given.what if word in CORPORA] or CORPORA
        seeds = [int(word) for word in given.what if word.isdigit()] or SEEDS
        wanted = [(c, t, s) for s in seeds for c in corpora for t in tasks if c == "wordnet" or t != TFIDF]
        fill_cells(CELLS, wanted, measure, workers=given.workers)
    write_tables("text", tables(read_cells(CELLS)))


if __name__ == "__main__":
    main()
