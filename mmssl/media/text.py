"""Text to token ids: one tokenizer class over the libraries' own, with a mask that is True where a token is valid.

Which word and which sentence a token belongs to is read off the text itself, at the place where the token begins, and
so is the same for every tokenizer. Words are what BERT's own pre-tokenizer makes: runs between white space, with every
punctuation mark and every Chinese character alone. A tokenizer's `word_ids` are no common measure: GPT-2 keeps the
apostrophe with what follows it, SentencePiece the full stop with what is before it, and some cut no words at all.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.media.units import first_tokens, run_ends, sentence_ends, unit_numbers, word_ends
from mmssl.media.vocabulary import clean, learn_vocabulary

SENTINEL = "<extra_id_{}>"
OPEN_CLIP_FILE = "open_clip_tokenizer.json"
# No vocabulary has tokens this long on average; it bounds the work on a text that is one endless line.
CHARACTERS_PER_TOKEN = 64
FIXED_LENGTH: dict[str, Any] = {
    "padding": "max_length",
    "padding_side": "right",
    "truncation": True,
    "split_special_tokens": True,
}


class Tokenizer:
    """Ids of one text, of fixed length, start and end tokens included.

    A text that is cut has an end token only where the library puts one there.

    Made by `load`, `train` or `open_clip`. It can be pickled, so that data workers get it.

    Args:
        library: a tokenizer of transformers, or one of open_clip.
        open_clip_name: model name that gave an open_clip tokenizer.

    Raises:
        RecipeError: for a library's tokenizer that has neither a padding nor an end token.

    Attributes:
        vocab_size: number of ids.
        pad_id: id of padding. For open_clip's own vocabulary it is 0, which also is a `!` inside a word: ask the mask.
        mask_id: id of `[MASK]`; None where the vocabulary has none.
        special_ids: ids that stand for no text.
        start_id: id of the token in front of a text; None where there is none.
        end_id: id of the token after a text; None where there is none.
    """

    vocab_size: int
    pad_id: int
    mask_id: int | None
    special_ids: frozenset[int]
    start_id: int | None
    end_id: int | None

    def __init__(self, library: Any, open_clip_name: str | None = None) -> None:
        self._library, self._open_clip_name = library, open_clip_name
        # open_clip wraps transformers' tokenizers; only its own byte-pair vocabulary has none inside.
        vocabulary = getattr(library, "tokenizer", None) if open_clip_name else library
        if vocabulary is None:
            self.vocab_size, self.pad_id, self.mask_id = library.vocab_size, 0, None
            self.special_ids = frozenset(library.all_special_ids)
            self.start_id, self.end_id = library.sot_token_id, library.eot_token_id
        else:
            if vocabulary.pad_token_id is None:
                vocabulary.pad_token = vocabulary.eos_token
            if vocabulary.pad_token_id is None:
                raise RecipeError(
                    "the tokenizer has neither a padding nor an end token, with which shorter texts are filled up; "
                    "name one (tokenizer.pad_token = ...) and save it"
                )
            self.vocab_size, self.pad_id, self.mask_id = (
                len(vocabulary),
                vocabulary.pad_token_id,
                vocabulary.mask_token_id,
            )
            self.special_ids = frozenset(vocabulary.all_special_ids)
            self.start_id = vocabulary.bos_token_id if vocabulary.cls_token_id is None else vocabulary.cls_token_id
            self.end_id = vocabulary.eos_token_id if vocabulary.sep_token_id is None else vocabulary.sep_token_id
        self._vocabulary: Any = vocabulary
        # GPT-2's tokenizer puts no end token after a text, from which a model learns where texts end.
        self._lacks_end = (
            vocabulary is not None
            and self.end_id is not None
            and open_clip_name is None
            and vocabulary("a")["input_ids"][-1:] != [self.end_id]
        )

    def __eq__(self, other: object) -> bool:
        """Whether every id stands for the same piece of text in both."""
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return self is other or (self.special_ids == other.special_ids and self._pieces() == other._pieces())

    def __hash__(self) -> int:
        return hash((self.vocab_size, self.special_ids))

    def _pieces(self) -> dict[str, int]:
        pieces: dict[str, int] = self._library.encoder if self._vocabulary is None else self._vocabulary.get_vocab()
        return pieces

    @property
    def pair_ids(self) -> tuple[int, int] | None:
        """Ids of `[CLS]` and `[SEP]`, which come before, between and after the parts of a pair; None without."""
        if self._vocabulary is None or None in (self._vocabulary.cls_token_id, self._vocabulary.sep_token_id):
            return None
        return self._vocabulary.cls_token_id, self._vocabulary.sep_token_id

    def __call__(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Encode one text.

        Special tokens that are spelt out in a text, such as `[MASK]`, are text to transformers' tokenizers.

        Args:
            text: any string; halves of surrogate pairs are joined, or replaced by U+FFFD where they are alone.
            length: number of ids, L.

        Returns:
            ids int64 (L,) and a mask bool (L,), True where a token is valid (start and end tokens are).

        Raises:
            RecipeError: where L leaves no room between the start and end token.
        """
        text = _clean(text, length)
        if self._open_clip_name:
            return self._open_clip_ids(text, length)
        encoded = self._library(text, max_length=length, **FIXED_LENGTH)
        return self._ended(
            torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"], dtype=torch.bool)
        )

    def _ended(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """With an end token after a text that was not cut, where the library puts none."""
        place = int(mask.sum())
        if self._lacks_end and self.end_id is not None and place < len(ids):
            ids[place], mask[place] = self.end_id, True
        return ids, mask

    def divide(self, text: str, length: int, parts: Sequence[str]) -> dict[str, Tensor]:
        """Encode one text, and number the words or sentences that its tokens belong to.

        A token that reaches over several belongs to the first of them. A sentence ends at `.`, `!`, `?` or an ellipsis
        before white space or the end, at their full-width forms, and at a line break (which open_clip makes a space).

        Args:
            text: as for a call.
            length: as for a call.
            parts: out of `text_word` and `text_sentence`.

        Returns:
            `text` and `text_mask`, as a call returns them, and each part: int64 (L,), from 0 without gaps, -1 for
            special tokens and padding.

        Raises:
            RecipeError: where the library does not tell where a token begins.
        """
        text = _clean(text, length)
        source = text
        if self._open_clip_name is None:
            starts, stops, content, ids, mask = self._located(text, length, FIXED_LENGTH)
        else:
            ids, mask = self._open_clip_ids(text, length)
            if getattr(self._library, "reduction_fn", None) is not None:
                raise RecipeError(f"{self._open_clip_name}: its tokenizer leaves out words and does not tell which")
            source = self._library.clean_fn(text)
            if self._vocabulary is None:
                starts, stops, content = self._open_clip_places(source, ids, mask)
            else:
                padded = {"padding": "max_length", "truncation": True}
                starts, stops, content, again, _ = self._located(source, length, padded)
                if not torch.equal(ids, again):
                    raise RecipeError(f"{self._open_clip_name}: its tokenizer does not tell where a token begins")
        source = source[: max(stops[content], default=0) + CHARACTERS_PER_TOKEN]
        found = {"text": ids, "text_mask": mask}
        for part in parts:
            ends = word_ends(source) if part == "text_word" else sentence_ends(source)
            found[part] = unit_numbers(ends, starts, content)
        return found

    def first_places(self, text: str, length: int) -> Tensor:
        """Where among the ids of a call each run between white space begins: the place of its first token.

        Args:
            text: as for a call.
            length: as for a call.

        Returns:
            int64, one a run; -1 for those of which no token is among the ids.

        Raises:
            RecipeError: where the library does not tell where a token begins.
        """
        if self._open_clip_name is not None:
            raise RecipeError(f"{self._open_clip_name}: its tokenizer changes texts before it cuts them into tokens")
        runs, text = len(run_ends(text)), _clean(text, length)
        starts, _, content, _, _ = self._located(text, length, FIXED_LENGTH)
        found = first_tokens(run_ends(text), starts, content)
        return torch.from_numpy(np.pad(found, (0, runs - len(found)), constant_values=-1))

    def whole(self, texts: Sequence[str], parts: Sequence[str] = ()) -> list[dict[str, list[int]]]:
        """All of each text, however long: ids without special tokens as `text`, and the words they belong to.

        Args:
            texts: any strings.
            parts: `text_word` or nothing; see `divide`.

        Raises:
            RecipeError: for open_clip's own vocabulary, whose library cuts every text, and where words are asked for
                and the library does not tell where a token begins.
        """
        if self._vocabulary is None:
            raise RecipeError("open_clip's own tokenizer cuts every text to its context; packing takes another one")
        texts = [clean(text) for text in texts]
        wanted = {"return_offsets_mapping": True} if parts else {}
        if parts and not self._vocabulary.is_fast:
            raise RecipeError("this tokenizer does not tell where a token begins, which words are found by")
        encoded = self._vocabulary(texts, add_special_tokens=False, verbose=False, **wanted)
        found: list[dict[str, list[int]]] = [{"text": ids} for ids in encoded["input_ids"]]
        for part in parts:
            for text, document, offsets in zip(texts, found, encoded["offset_mapping"], strict=True):
                starts = np.array([start for start, _ in offsets], dtype=np.int64)
                document[part] = unit_numbers(word_ends(text), starts, np.ones(len(starts), dtype=bool)).tolist()
        return found

    def token_starts(self, text: str) -> list[int]:
        """The character at which each token of a text begins, special tokens aside.

        Where the library does not tell, words stand for tokens.
        """
        if self._vocabulary is None or not self._vocabulary.is_fast:
            return [match.start() for match in re.finditer(r"\S+", text)]
        encoded = self._vocabulary(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in encoded["offset_mapping"]]

    def _open_clip_ids(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        ids = self._library([text], context_length=length)[0]
        if self._vocabulary is not None:
            return ids, ids != self.pad_id
        end = int((ids == self.end_id).nonzero()[-1])
        return ids, torch.arange(length) <= end

    def _located(
        self, text: str, length: int, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor, Tensor]:
        """First character, end and whether it is content of each token, ids, mask."""
        if not self._vocabulary.is_fast:
            kind = type(self._vocabulary).__name__
            raise RecipeError(
                f"a {kind} does not tell where a token begins, which words and sentences are found by; "
                "take a tokenizer that has a tokenizer.json, or train:8000"
            )
        encoded = self._vocabulary(
            text, max_length=length, return_offsets_mapping=True, return_special_tokens_mask=True, **options
        )
        mask = torch.tensor(encoded["attention_mask"], dtype=torch.bool)
        content = mask.numpy() & (np.array(encoded["special_tokens_mask"]) == 0)
        starts, stops = np.array(encoded["offset_mapping"]).T
        return starts, stops, content, *self._ended(torch.tensor(encoded["input_ids"]), mask)

    def _open_clip_places(self, source: str, ids: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same for open_clip's own vocabulary: its last token of each match of its pattern ends in `</w>`."""
        matches = [(match.start(), match.end()) for match in self._library.pat.finditer(source)]
        pieces = np.array(matches or [(0, 0)])
        special = [i in self.special_ids for i in ids.tolist()]
        content = mask.numpy() & ~np.array(special)
        # The start token ends no match; a special token that is spelt out in the text is one.
        ends = [self._library.decoder[i].endswith("</w>") or i in self.special_ids for i in ids.tolist()]
        number = np.concatenate([[0, 0], np.cumsum(ends[1:-1])]).clip(max=len(pieces) - 1)
        return pieces[number, 0], pieces[number, 1], content

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of the ids; padding, start and end are left out, `[MASK]`, `[UNK]` and sentinels are shown."""
        ids = [int(i) for i in ids]
        if self._vocabulary is None:
            if self.end_id in ids:
                ids = ids[: ids.index(self.end_id)]
            return str(self._library.decode([i for i in ids if i not in self.special_ids])).strip()
        shown = {self.mask_id, self._vocabulary.unk_token_id, *self.sentinel_ids} - {self.start_id, self.end_id}
        kept = [i for i in ids if i not in self.special_ids or i in shown]
        return str(self._vocabulary.decode(kept, skip_special_tokens=False)).strip()

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Ids of T5's tokens `<extra_id_0>`, `<extra_id_1>` ..., in place of removed spans; empty without them."""
        known = {} if self._vocabulary is None else self._vocabulary.get_added_vocab()
        return tuple(known[token] for token in takewhile(known.__contains__, map(SENTINEL.format, count())))

    def with_sentinels(self, number: int) -> Tokenizer:
        """The same tokenizer with at least so many sentinels, above its other ids and descending as T5's are.

        Raises:
            RecipeError: for open_clip's tokenizers, and for one that has sentinels, but fewer.
        """
        have = len(self.sentinel_ids)
        if have >= number:
            return self
        if have or self._open_clip_name:
            raise RecipeError(f"this tokenizer has {have} sentinels and takes no more; {number} were asked for")
        from transformers import AddedToken

        library = copy.deepcopy(self._library)
        tokens = [AddedToken(SENTINEL.format(k), special=True) for k in reversed(range(number))]
        library.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
        return Tokenizer(library)

    def save(self, directory: str | Path) -> None:
        """Write files that `load` reads; those of transformers' tokenizers are read by `AutoTokenizer` too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._open_clip_name:
            (directory / OPEN_CLIP_FILE).write_text(json.dumps({"name": self._open_clip_name}), encoding="utf-8")
        else:
            self._library.save_pretrained(directory)

    @classmethod
    def load(cls, name: str | Path) -> Tokenizer:
        """Read what `save` wrote, or any tokenizer that transformers knows, from a directory or the Hub.

        Raises:
            RecipeError: where there is none.
        """
        named = Path(name) / OPEN_CLIP_FILE
        if os.path.isfile(named):
            return cls.open_clip(json.loads(named.read_text(encoding="utf-8"))["name"])
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(name), trust_remote_code=False))
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"there is no tokenizer in '{name}', neither as a directory nor on the Hub: {reason}; "
                "'train:8000' makes one from the texts at hand"
            ) from error

    @classmethod
    def open_clip(cls, name: str) -> Tokenizer:
        """The tokenizer of an open_clip model, for instance `ViT-B-32`.

        Raises:
            RecipeError: where open_clip knows no such model.
        """
        import open_clip

        if ":" not in name and name not in open_clip.list_models():
            raise RecipeError(f"open_clip has no model named '{name}'; open_clip.list_models() names them")
        try:
            return cls(open_clip.get_tokenizer(name), name)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"cannot load the tokenizer of open_clip's '{name}': {reason}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """One with a vocabulary learned from the texts; see `mmssl.media.vocabulary`."""
        return cls(learn_vocabulary(texts, vocab_size))


def _clean(text: str, length: int) -> str:
    """What of the text can matter, in characters that can be encoded."""
    if length < 3:
        raise RecipeError(f"text.length = {length} leaves no room between the start and end token; use 3 or more")
    return clean(text[: CHARACTERS_PER_TOKEN * length])
