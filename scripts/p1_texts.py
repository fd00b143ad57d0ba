"""Writes the texts of protocol P1: WikiText-2's tokenized edition, as one file a split.

    python scripts/p1_texts.py data        # data/wikitext2/valid.txt and test.txt

The hub has the text as lines, with white space gone from empty ones; a checksum tells that the files are the ones that
every number of the protocol was measured on.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

SPLITS = {
    "valid": ("validation", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
    "test": ("test", "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),
}


def joined(lines: Iterable[str]) -> str:
    """The file that the hub's lines were made of."""
    return "".join(line or " \n" for line in lines)


def write(folder: Path, name: str, text: str) -> None:
    """Write a split if it is the right text."""
    if hashlib.sha256(text.encode()).hexdigest() != SPLITS[name][1]:
        raise SystemExit(f"{name}: the text isn't that of protocol P1; numbers measured on it can't be compared")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_bytes(text.encode())


def main(folder: Path) -> None:
    import datasets

    for name, (split, _) in SPLITS.items():
        if not (folder / f"{name}.txt").is_file():
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-v1", split=split)
            write(folder, name, joined(rows["text"]))
    print(f"the texts are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "wikitext2")
