"""Which word and sentence a token belongs to, for every kind of tokenizer: read off the text, not off the tokens."""

from __future__ import annotations

import pickle

import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer as Model
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from mmssl.data.columns import Decoder
from mmssl.decode_settings import TextDecode
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.recipe import Data

TEXTS = [
    "Don't stop. It's 3.5 km (or so)!",
    'He said "go." They went... home?\nA new line',
    "猫が好き。犬も。 Ende",
    "\U0001f600 ok",
]
PARTS = ("text_word", "text_sentence")


def fast(model: Model, **special: str) -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=model, **special))


def byte_level() -> Tokenizer:
    """As GPT-2's: spaces belong to what follows, no start and no end token."""
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<e>"], initial_alphabet=alphabet)
    model.train_from_iterator(["stop it stop it or stop the new line"], trainer)
    return fast(model, eos_token="<e>")


def unigram() -> Tokenizer:
    """As T5's: pieces of SentencePiece, punctuation is part of a word."""
    model = Model(models.Unigram())
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    model.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>"))
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return fast(model, pad_token="<pad>", eos_token="</s>", sep_token="</s>", unk_token="<unk>")


def whole_text() -> Tokenizer:
    """As Llama's: merges run over the whole text, so that `word_ids` are 0 throughout."""
    model = Model(models.BPE(unk_token="<u>"))
    model.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=20, special_tokens=["<u>", "<p>"]))
    return fast(model, unk_token="<u>", pad_token="<p>")


def wordpiece() -> Tokenizer:
    model = Model(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    model.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return fast(model, mask_token="[MASK]", **names)


def clip_wrapper(folder) -> Tokenizer:
    """open_clip around a tokenizer of transformers, as its SigLIP has it: it lowers the case and drops punctuation."""
    unigram().save(folder)
    return Tokenizer(HFTokenizer(str(folder), clean="canonicalize"), "ViT-B-16-SigLIP")


MADE = {
    "trained": lambda _: Tokenizer.train(TEXTS * 2, 200),
    "wordpiece": lambda _: wordpiece(),
    "byte level": lambda _: byte_level(),
    "unigram": lambda _: unigram(),
    "whole text": lambda _: whole_text(),
    "open_clip": lambda _: Tokenizer.open_clip("ViT-B-32"),
}


@pytest.fixture(scope="module", params=MADE)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return MADE[request.param](tmp_path_factory.mktemp("tokenizer"))


def pieces(tokenizer: Tokenizer, text: str, part: str, length: int = 64) -> list[str]:
    """The text of each unit, without white space and in lower case."""
    row = tokenizer.divide(text, length, [part])
    number = row[part]
    decoded = [tokenizer.decode(row["text"][number == n]) for n in range(int(number.max()) + 1)]
    return ["".join(text.replace("\u2581", " ").lower().split()) for text in decoded]


def test_ids_are_those_of_a_call_and_numbers_count_from_zero(tokenizer):
    for text in [*TEXTS, "a word " * 50, "\ud83d x", "[MASK] <end_of_text> x"]:
        row = tokenizer.divide(text, 40, PARTS)
        ids, mask = tokenizer(text, 40)
        assert torch.equal(row["text"], ids)
        assert torch.equal(row["text_mask"], mask)
        for part in PARTS:
            number = row[part]
            assert (number.dtype, number.shape) == (torch.int64, (40,))
            assert (number[~mask] == -1).all()
            inside = number[number >= 0]
            assert inside.tolist() == sorted(inside.tolist())
            assert set(inside.tolist()) == set(range(int(inside.max()) + 1))
        assert torch.equal(row["text_word"] >= 0, row["text_sentence"] >= 0)
        # A word is part of one sentence.
        for word in range(int(row["text_word"].max()) + 1):
            assert len(set(row["text_sentence"][row["text_word"] == word].tolist())) == 1


def test_start_end_and_padding_belong_to_nothing():
    for tokenizer in (MADE["trained"](None), wordpiece(), MADE["open_clip"](None)):
        row = tokenizer.divide("stop it", 16, PARTS)
        last = int(row["text_mask"].sum()) - 1
        outside = (row["text_word"] == -1).nonzero()[:, 0].tolist()
        assert outside == [0, *range(last, 16)]
    row = unigram().divide("stop it", 16, PARTS)
    assert (row["text_word"] == -1).nonzero()[0, 0] == row["text_mask"].sum() - 1


def test_words_are_berts(tokenizer):
    expected = ["don", "'", "t", "stop", ".", "it", "'", "s", "3", ".", "5", "km", "(", "or", "so", ")", "!"]
    if tokenizer.vocab_size > 40_000:
        # Tokens of open_clip that reach over two words belong to the first.
        expected = ["don", "'t", "stop", ".", "it", "'s", "3", ".", "5", "km", "(", "or", "so", ")!"]
    assert pieces(tokenizer, TEXTS[0], "text_word") == expected


def test_wordpiece_words_begin_without_hashes():
    """BERT's own rule: a piece that begins with ## goes on with the word before it."""
    tokenizer = wordpiece()
    for text in (*TEXTS, "stopping homes, whose cats went!? " * 3):
        row = tokenizer.divide(text, 128, ["text_word"])
        inside = row["text_word"] >= 0
        tokens = tokenizer._library.convert_ids_to_tokens(row["text"][inside].tolist())
        begins = torch.tensor([not token.startswith("##") for token in tokens])
        assert torch.equal(row["text_word"][inside], begins.cumsum(0) - 1)


def test_sentences_end_at_stops_before_white_space(tokenizer):
    assert pieces(tokenizer, TEXTS[0], "text_sentence") == ["don'tstop.", "it's3.5km(orso)!"]
    lines = ["anewlinea"] if tokenizer.vocab_size > 40_000 else ["anewline", "a"]
    expected = ['hesaid"go."', "theywent...", "home?", *lines]
    assert pieces(tokenizer, TEXTS[1] + "\n \n\na", "text_sentence") == expected


def test_full_width_stops_and_chinese_characters():
    row = byte_level().divide(TEXTS[2], 64, PARTS)
    assert row["text_word"].max() + 1 == len("猫が好き。犬も。") + 1
    for tokenizer in (byte_level(), wordpiece(), MADE["open_clip"](None)):
        assert tokenizer.divide(TEXTS[2], 64, PARTS)["text_sentence"].max() == 2


def test_bytes_of_one_character_are_one_word():
    assert byte_level().divide("\U0001f9a9 ok", 16, PARTS)["text_word"].tolist() == [0] * 4 + [1] * 3 + [-1] * 9


@pytest.mark.parametrize("text", ["", " ", "\n\n", " " * 100_000, "\x00", "\udc80", "!" * 1000, "a" * 100_000, ". . ."])
def test_any_string_can_be_divided(tokenizer, text):
    row = tokenizer.divide(text, 16, PARTS)
    assert set(row) == {"text", "text_mask", *PARTS}
    for part in PARTS:
        assert row[part].shape == (16,)
        assert int(row[part].min()) >= -1
        assert int(row[part].max()) < int(row["text_mask"].sum())


def test_what_is_cut_off_changes_nothing(tokenizer):
    text = "Stop. " * 5 + "x" * 50
    short, long = (tokenizer.divide(text, length, PARTS) for length in (8, 64))
    for part in PARTS:
        kept = short[part] >= 0
        assert torch.equal(short[part][kept], long[part][:8][kept])


def test_it_can_be_sent_to_workers(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    for key, value in tokenizer.divide(TEXTS[0], 32, PARTS).items():
        assert torch.equal(again.divide(TEXTS[0], 32, PARTS)[key], value)


def test_what_does_not_tell_where_a_token_begins_is_refused(tmp_path):
    class Slow(PreTrainedTokenizer):
        vocab_size = 3

        def get_vocab(self):
            return {"<pad>": 0, "<unk>": 1, "a": 2}

        def _tokenize(self, text, **_):
            return text.split()

        def _convert_token_to_id(self, token):
            return self.get_vocab().get(token, 1)

        def _convert_id_to_token(self, index):
            return list(self.get_vocab())[index]

    slow = Tokenizer(Slow(pad_token="<pad>", unk_token="<unk>"))
    spec = Data(source="here", text=TextDecode(length=8))
    assert Decoder(spec, ["text"], columns=["text"], tokenizers={"text": slow})({"text": "a b"}, 0.0)["text"][0] == 2
    with pytest.raises(RecipeError, match=r"a Slow does not tell where a token begins.*train:8000"):
        Decoder(spec, ["text", "text_word"], columns=["text"], tokenizers={"text": slow})
    leaving_out = Tokenizer(SimpleTokenizer(reduction_mask="random"), "ViT-L-14-CLIPA")
    with pytest.raises(RecipeError, match="ViT-L-14-CLIPA: its tokenizer leaves out words"):
        leaving_out.divide("a b", 8, PARTS)
    wrapped = clip_wrapper(tmp_path)
    assert pieces(wrapped, "Don't stop it", "text_word") == ["dont", "stop", "it"]
    wrapped._library.strip_sep_token = True
    with pytest.raises(RecipeError, match="does not tell where a token begins"):
        wrapped.divide("a b", 8, PARTS)


def test_only_what_is_asked_for_is_decoded():
    tokenizer = Tokenizer.train(TEXTS * 2, 200)
    spec = Data(source="here", text=TextDecode(length=32))
    for needs, keys in (
        (["text"], set()),
        (["text", "text_word"], {"text_word"}),
        (["text_sentence", "text_word"], set(PARTS)),
    ):
        decoder = Decoder(spec, needs, columns=["text"], tokenizers={"text": tokenizer})
        row = decoder({"text": TEXTS[0]}, 0.0)
        assert decoder.reads == ("text",)
        assert set(row) == {"text", "text_mask"} | keys
