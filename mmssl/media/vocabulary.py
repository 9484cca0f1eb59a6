"""A vocabulary that is learned from the texts at hand, as a tokenizer of transformers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from mmssl.errors import DataError

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def learn_vocabulary(texts: Iterable[str], vocab_size: int) -> Any:
    """Learn a vocabulary: lower-cased byte-pair encoding inside words, with BERT's special tokens as ids 0 to 4.

    Byte-pair rather than BERT's WordPiece, because `tokenizers` numbers the pieces of WordPiece in another order
    at every training. A space is part of the word that follows it; punctuation is a part of its own.

    Args:
        texts: read once.
        vocab_size: largest number of ids; few texts give fewer.

    Raises:
        DataError: where there is no text, or the texts have more characters than the vocabulary has ids.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Model
    from transformers import PreTrainedTokenizerFast

    _, unknown, start, end, _ = tokens = list(SPECIAL_TOKENS.values())
    model = Model(models.BPE(unk_token=unknown))
    model.normalizer = normalizers.Sequence(
        [normalizers.BertNormalizer(lowercase=True), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    model.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=tokens, show_progress=False)
    model.train_from_iterator(map(clean, texts), trainer)
    # Worker processes are forked later; without this `tokenizers` warns in each of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    learned = model.get_vocab_size()
    if learned <= len(tokens):
        raise DataError("a tokenizer cannot be trained on no text: the text column is empty")
    if learned > vocab_size:
        raise DataError(
            f"the texts have {learned - len(tokens)} different characters, "
            f"too many for a vocabulary of {vocab_size}; use train:{2 * learned} or more"
        )
    model.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(start, tokens.index(start)), (end, tokens.index(end))],
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL_TOKENS)


def clean(text: str) -> str:
    """Characters that can be encoded: halves of surrogate pairs are joined, or U+FFFD where they are alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
