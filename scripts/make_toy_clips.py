"""Write clips with sound of the toy world, to try a recipe that reads a folder of clips.

python scripts/make_toy_clips.py clips      400 clips in clips/train and 150 in clips/test, 40 MB
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmssl.data.toy import write_clips

parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
parser.add_argument("directory", type=Path)
parser.add_argument("--train", type=int, default=400, help="number of clips, 400 by default")
parser.add_argument("--test", type=int, default=150, help="number of clips, 150 by default")
given = parser.parse_args()
for split in ("train", "test"):
    written = write_clips(given.directory / split, getattr(given, split), split)
    print(f"{len(written)} clips in {given.directory / split}")
