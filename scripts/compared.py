"""Tables of docs/results.md that `mmssl compare` makes: which pretext task, on each of these data sets.

    MMSSL_DATA=path/to/data python scripts/compared.py fashion_cnn        goes on where it was; then the table
    MMSSL_DATA=path/to/data python scripts/compared.py fashion_cnn --tasks simclr,rotation
    python scripts/compared.py --table                                    only the tables that build/compared holds
    python scripts/compared.py --list                                     the calls, as a command line has them

Runs, cells, pages and tables of a comparison are in build/compared/NAME; tasks that are named with those that are there
become lines of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from pitches import write_pitches
from tables import RESULTS, spread, write_tables

from mmssl.atomic import write_text

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "compared"
ARTIST = HOME / "artist"
CNN = {"model": "timm/resnet10t", "channels": [32, 64, 128, 256], "stem_width": 16}
VIT = {
    "model": "timm/vit_tiny_patch16_224",
    **{"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 4, "num_heads": 4},
}
FASHION = {"data": "$MMSSL_DATA/fashion", "label": "category", "size": 28, "budget": "steps=400", "audit": False}
COMPARISONS: dict[str, dict[str, Any]] = {
    "fashion_cnn": {**FASHION, "encoder": CNN},
    "fashion_vit": {**FASHION, "encoder": VIT},
    # The same question with other tasks, for one call of all would take three hours.
    "fashion_vit_views": {**FASHION, "encoder": VIT},
    "fashion_vit_instances": {**FASHION, "encoder": VIT},
    "emoji_cnn": {
        **{"data": "$MMSSL_DATA/emoji", "label": "category", "groups": "concept"},
        **{"size": 32, "budget": "steps=800", "rates": [1.0, 3.0], "audit": False, "encoder": CNN},
    },
    "emoji_artist": {
        **{"runs": "emoji_cnn", "data": "build/compared/artist", "label": "category", "groups": "concept"},
        "audit": False,
    },
    "toy_shape": {"data": "toy", "label": "shape", "size": 32, "budget": "steps=400", "audit": False, "encoder": CNN},
    **{
        f"toy_{factor}": {"runs": "toy_shape", "label": factor, "audit": False}
        for factor in ("color", "texture", "count")
    },
    "toy_position": {"runs": "toy_shape", "label": "position", "probe": "ridge", "shots": [], "audit": False},
}
NOTES: dict[str, Any] = {"groups": "preset", "shots": [], "audit": False}
PITCHES: dict[str, Any] = {"runs": "notes_family", "data": "build/compared/pitches", **NOTES}
COMPARISONS |= {
    "notes_family": {
        **{"data": "$MMSSL_DATA/notes", "label": "family", "seconds": 1.28, "budget": "steps=200", "batch": 64},
        # From the stroke on, decoded once; of 0.3, 1 and 3 four of five tasks chose this rate on validation rows.
        **{"set": {"start": "first", "cache": "build/compared/decoded"}, "rates": [3.0]},
        **NOTES,
        "encoder": {
            **{"model": "timm/resnet10t", "channels": [16, 32, 64, 128], "stem_width": 8},
            **{"mels": 64, "n_fft": 1024, "hop": 320},
        },
    },
    "notes_pitch_class": {**PITCHES, "label": "pitch_class"},
    "notes_height": {**PITCHES, "label": "note", "target": "values", "probe": "ridge"},
}
WAVES: dict[str, Any] = {"runs": "waves_family", "data": "build/compared/pitches", **NOTES}
COMPARISONS |= {
    "waves_family": {
        **COMPARISONS["notes_family"],
        # A frame every 20 ms, as of the published networks, by three convolutions in place of seven.
        "encoder": {
            **{"model": "transformers/wav2vec2", "num_feat_extract_layers": 3, "conv_dim": [32, 64, 96]},
            **{"conv_kernel": [32, 8, 4], "conv_stride": [16, 5, 4]},
            **{"feat_extract_norm": "layer", "do_stable_layer_norm": True, "hidden_size": 96, "num_hidden_layers": 4},
            **{"num_attention_heads": 4, "intermediate_size": 384},
            **{"num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 4},
        },
        "rates": [1.0, 3.0],
    },
    "waves_pitch_class": {**WAVES, "label": "pitch_class"},
    "waves_height": {**WAVES, "label": "note", "target": "values", "probe": "ridge"},
}
PATCHES: dict[str, Any] = {"runs": "patches_family", "data": "build/compared/pitches", **NOTES}
COMPARISONS |= {
    "patches_family": {
        **COMPARISONS["notes_family"],
        # 8 x 8 patches of 8 bands and 0.16 s.
        "encoder": {
            **{"model": "timm/vit_tiny_patch16_224", "img_size": [64, 64], "patch_size": 8},
            **{"embed_dim": 96, "depth": 4, "num_heads": 4, "mels": 64, "n_fft": 1024, "hop": 320},
        },
        "rates": [1.0, 3.0],
    },
    "patches_pitch_class": {**PATCHES, "label": "pitch_class"},
    "patches_height": {**PATCHES, "label": "note", "target": "values", "probe": "ridge"},
}
COMPARISONS["wordnet_text"] = {
    **{"data": "$MMSSL_DATA/wordnet", "label": "category", "budget": "steps=400", "batch": 128, "audit": False},
    **{"set": {"text": {"length": 32}}, "rates": [1.0, 3.0]},
    "encoder": {
        **{"model": "transformers/modernbert", "tokenizer": "train:6000", "hidden_size": 128, "num_hidden_layers": 2},
        # SimCSE's two views of a text differ by dropout.
        **{"num_attention_heads": 4, "intermediate_size": 256, "initializer_range": 0.05, "dropout": 0.1},
    },
}
# Marks -> a comparison a column: one table of what the same runs were asked.
COLUMNS = {
    "toy": {
        **{f"{factor}, %": f"toy_{factor}" for factor in ("shape", "color", "texture", "count")},
        "position, R²": "toy_position",
    },
    "emoji": {"unseen concepts, %": "emoji_cnn", "by an artist without labels, %": "emoji_artist"},
    "patches": {"family, %": "patches_family", "pitch class, %": "patches_pitch_class", "height, R²": "patches_height"},
    "waves": {"family, %": "waves_family", "pitch class, %": "waves_pitch_class", "height, R²": "waves_height"},
}

# What `mmssl compare` says without labels of these comparisons: data, network.
RANKED = {
    "fashion_cnn": ("clothes (Fashion-MNIST)", "small ResNet"),
    "fashion_vit": ("clothes (Fashion-MNIST)", "small vision transformer, tasks that hide patches"),
    "fashion_vit_views": ("clothes (Fashion-MNIST)", "small vision transformer, tasks that hide none"),
    "fashion_vit_instances": ("clothes (Fashion-MNIST)", "small vision transformer, the other tasks"),
    "emoji_cnn": ("emoji", "small ResNet"),
    "notes_family": ("recorded notes", "log-mel ResNet, family"),
    "notes_pitch_class": ("recorded notes", "log-mel ResNet, pitch class"),
    "notes_height": ("recorded notes", "log-mel ResNet, height"),
    "waves_family": ("recorded notes", "waveform transformer, family"),
}
AGREEMENT = re.compile(r"(\S+) ([+-][\d.]+) \(Spearman ([+-][\d.]+), p = ([\d.]+), (\d+) tasks\)")


def command(name: str) -> str:
    """The comparison as `mmssl compare` is called."""
    words = ["mmssl", "compare"]
    for key, value in COMPARISONS[name].items():
        if key == "runs":
            words += [f"build/compared/{value}/runs/*-[0-2]"]
        elif value is False:
            words.append(f"--no-{key}")
        elif key in ("shots", "rates"):
            words += [f"--{key}", ",".join(map(str, value)) or "0"]
        elif key == "set":
            for setting, one in value.items():
                parts = {f".{part}": own for part, own in one.items()} if isinstance(one, dict) else {"": one}
                words += [word for part, own in parts.items() for word in ("--set", f"{setting}{part}={own}")]
        else:
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return " ".join(word if word.startswith(("$", "build")) else shlex.quote(word) for word in words)


def write(name: str) -> None:
    """The table between the marks of its name."""
    import mmssl
    from mmssl.comparison.page import depth_curves

    if f"<!-- {name} -->" in RESULTS.read_text(encoding="utf-8") and (HOME / name).exists():
        found = mmssl.Comparison.read(HOME / name)
        notes = "\n".join(f"- {note}" for note in found.notes())
        depth_curves(found).savefig(RESULTS.parent / f"{name}_depths.png", dpi=120)
        drawn = f"![{found.main} by depth, shallow on the left]({name}_depths.png)"
        write_tables(name, f"{found.markdown()}\n\n{found.sentence.partition(' Next:')[0]}\n\n{notes}\n\n{drawn}")


def write_columns(mark: str) -> None:
    """A comparison a column, each line at its best depth, between the marks; a star where the interval lacks 0."""
    import mmssl
    from mmssl.comparison.comparison import title_of
    from mmssl.comparison.plan import UNTRAINED

    there = {title: HOME / name for title, name in COLUMNS[mark].items() if (HOME / name).exists()}
    found = {title: mmssl.Comparison.read(folder) for title, folder in there.items()}
    found = {title: one for title, one in found.items() if len(one.cells.get(UNTRAINED, ())) == len(one.plan.seeds)}
    if f"<!-- {mark} -->" not in RESULTS.read_text(encoding="utf-8") or not found:
        return
    rows = [["", *found], ["---"] * (1 + len(found))]
    for line in next(iter(found.values())).cells:
        row = [title_of(line)]
        for one in found.values():
            if line not in one.cells:
                row.append("")
                continue
            scale, gain = 100 if one.percent else 1, ""
            if line != UNTRAINED:
                difference = one.difference(line, UNTRAINED, one.main)
                gain = f" ({scale * difference.mean:+.{1 if one.percent else 3}f}{'*' if difference.told else ''})"
            values = [scale * value for value in one.values(line, one.main)]
            row.append(spread(values, 1 if one.percent else 3) + gain)
        rows.append(row)
    constant = [one.cells[UNTRAINED][0]["constant"][one.main] * (100 if one.percent else 1) for one in found.values()]
    rows.append(["constant answer", *(f"{round(value, 1) + 0:.1f}" for value in constant)])
    write_tables(mark, "\n".join(f"| {' | '.join(row)} |" for row in rows))


def agreements(text: str) -> list[dict[str, Any]]:
    """How well rankings without labels agreed with probes, as the tables of docs/results.md say it."""
    found = []
    for name, (data, network) in RANKED.items():
        own = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
        line = re.search(
            r"^- agreement with probes, Kendall's tau with the order by (.+), here: (.+)$", own, re.MULTILINE
        )
        if line is not None:
            parts = AGREEMENT.findall(line[2])
            by = {
                title: {"tau": float(tau), "rho": float(rho), "p": float(p), "tasks": int(tasks)}
                for title, tau, rho, p, tasks in parts
            }
            found.append({"data": data, "network": network, "probe": line[1], "by": by})
    return found


def write_agreements() -> None:
    """What `mmssl compare` says where there are no labels."""
    found = agreements(RESULTS.read_text(encoding="utf-8"))
    write_text(ROOT / "mmssl" / "comparison" / "agreements.json", json.dumps(found, indent=1) + "\n")


def write_artist() -> None:
    """Drawings of two artists to learn from, and test concepts as the third draws them; unless the files are there."""
    import datasets

    for split, styles in (("train", ("google", "twitter")), ("test", ("openmoji",))):
        target = ARTIST / f"{split}.parquet"
        if not target.exists():
            source = Path(os.environ["MMSSL_DATA"]) / "emoji" / target.name
            rows = datasets.load_dataset("parquet", data_files=str(source), split="train")
            ARTIST.mkdir(parents=True, exist_ok=True)
            rows.filter(lambda row, styles=styles: row["style"] in styles).to_parquet(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument("--tasks", help="as of mmssl compare; all that fit where left out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only the tables")
    parser.add_argument("--list", action="store_true", help="only the calls")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in COMPARISONS]:
        parser.error(f"there is no comparison '{unknown[0]}'; there are {', '.join(COMPARISONS)}")
    for name in given.names or COMPARISONS:
        if given.list:
            print(f"{name}: {command(name)}")
            continue
        if not given.table:
            import mmssl
            from mmssl.recipe import Data

            called = dict(COMPARISONS[name])
            if settings := called.pop("set", None):
                called["data"] = Data(source=called["data"], **settings)
            if called.get("data") == PITCHES["data"]:
                write_pitches()
            if name == "emoji_artist":
                write_artist()
            if whose := called.get("runs"):
                called["runs"] = sorted((HOME / whose / "runs").glob("*-[0-2]"))
            else:
                called["tasks"] = given.tasks.split(",") if given.tasks else None
            mmssl.compare(**called, out=HOME / name, jobs=given.jobs)
        write(name)
    write_agreements()
    for mark, columns in COLUMNS.items():
        if set(columns.values()) & set(given.names or COMPARISONS):
            write_columns(mark)


if __name__ == "__main__":
    main()
