"""Encoder-decoders: equal to the library, causal, deaf to padding, and they leave whole."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from mmssl.encoders import create, reinitialized
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer

T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
MODELS = {"t5": T5, "mt5": T5, "bart": BART, "pegasus": BART}
TEXTS = ("a red square", "a blue circle on a green ground", "red")

each = pytest.mark.parametrize("name", MODELS)
both = pytest.mark.parametrize("name", ["t5", "bart"])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*TEXTS] * 4, 120)


def build(name, tokenizer, **kwargs):
    torch.manual_seed(0)
    encoder = create(f"transformers/{name}", "text", tokenizer=tokenizer, **MODELS[name], **kwargs).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def encode(tokenizer, length=10):
    ids, masks = zip(*(tokenizer(text, length) for text in TEXTS), strict=True)
    return torch.stack(ids), torch.stack(masks)


def answer(encoder, ids, mask, said, valid):
    return encoder.logits(encoder.decode(encoder.shift(said), valid, encoder(ids, mask)))


@pytest.mark.quick(2)
@each
def test_it_is_the_librarys_encoder_and_decoder(name, tokenizer):
    encoder = build(name, tokenizer, decoder=True)
    net = AutoModelForSeq2SeqLM.from_config(encoder.backbone.net.config).double().eval()
    net.load_state_dict(encoder.backbone.net.state_dict())
    ids, mask = encode(tokenizer)
    said = ids.flip(0)
    expected = net(input_ids=ids, attention_mask=mask.long(), labels=said)
    features = encoder(ids, mask)
    torch.testing.assert_close(features.tokens[mask], expected.encoder_last_hidden_state[mask])
    assert features.grid == (10,)
    torch.testing.assert_close(list(encoder.layers(ids, mask).values())[-1].tokens, features.tokens)
    logits = answer(encoder, ids, mask, said, torch.ones_like(mask))
    torch.testing.assert_close(logits, expected.logits)
    # What is padded at the end of the decoder changes nothing in front of it.
    valid = mask.flip(0)
    torch.testing.assert_close(answer(encoder, ids, mask, said, valid)[valid], logits[valid])


@both
def test_it_decodes_causally_and_sees_the_valid_memory_alone(name, tokenizer):
    encoder = build(name, tokenizer, decoder=True)
    ids, mask = encode(tokenizer)
    tokens = encoder(ids, mask).tokens.detach().requires_grad_()
    memory = encoder(ids, mask)._replace(tokens=tokens)
    embedded = []
    handle = encoder.backbone.net.get_decoder().embed_tokens.register_forward_hook(
        lambda module, given, made: embedded.append(made.requires_grad_()) or made
    )
    hidden = encoder.decode(encoder.shift(ids), torch.ones_like(mask), memory)
    handle.remove()
    for place in (0, 4, 9):
        seen, heard = torch.autograd.grad(hidden[:, place].square().sum(), (embedded[0], tokens), retain_graph=True)
        assert (seen.abs().amax(2)[:, : place + 1] > 0).all()
        assert (seen[:, place + 1 :] == 0).all()
        assert ((heard.abs().amax(2) > 0) == mask).all()


@pytest.mark.quick(1)
@both
def test_it_leaves_whole_and_comes_back(name, tokenizer, tmp_path):
    encoder = build(name, tokenizer, decoder=True).float()
    encoder.export(tmp_path)
    net, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer.vocab_size
    assert net.get_output_embeddings().weight is net.get_input_embeddings().weight
    assert net.generation_config.decoder_start_token_id == encoder.backbone.net.config.decoder_start_token_id
    ids, mask = encode(tokenizer)
    expected = net.eval()(input_ids=ids, attention_mask=mask.long(), labels=ids).logits
    everything = torch.ones_like(mask)
    torch.testing.assert_close(answer(encoder, ids, mask, ids, everything), expected)
    assert net.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=3, min_length=0).shape[1] <= 4

    again = create(
        f"transformers/{name}", "text", tokenizer=tokenizer, pretrained=f"local-dir:{tmp_path}", decoder=True
    )
    torch.testing.assert_close(answer(again.eval(), ids, mask, ids, everything), expected)
    half = create(f"transformers/{name}", "text", tokenizer=tokenizer, pretrained=f"local-dir:{tmp_path}").eval()
    torch.testing.assert_close(half(ids, mask).pooled, encoder(ids, mask).pooled)
    for one in (encoder, again, half):
        other = reinitialized(one, 3)
        assert other.decodes == one.decodes
        assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in one.state_dict().items()}
        assert not torch.equal(other(ids, mask).pooled, one(ids, mask).pooled)


@pytest.mark.quick(1)
@both
def test_without_its_decoder_every_weight_is_the_encoders(name, tokenizer, tmp_path):
    encoder = build(name, tokenizer)
    assert not encoder.decodes
    ids, mask = encode(tokenizer)
    encoder(ids, mask).pooled.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    with pytest.raises(RecipeError, match="decoder: true"):
        encoder.decode(ids, mask, encoder(ids, mask))
    encoder.float().export(tmp_path)
    net, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert all(key.startswith("decoder.") for key in report["missing_keys"])
    tokens = net.eval().get_encoder()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(tokens[mask], encoder(ids, mask).tokens[mask])
    back = create(f"transformers/{name}", "text", tokenizer=tokenizer, pretrained=f"local-dir:{tmp_path}").eval()
    torch.testing.assert_close(back(ids, mask).pooled, encoder(ids, mask).pooled)
    with pytest.raises(RecipeError, match="has no weights for"):
        create(f"transformers/{name}", "text", tokenizer=tokenizer, pretrained=f"local-dir:{tmp_path}", decoder=True)


@both
def test_a_row_of_padding_is_finite(name, tokenizer):
    encoder = build(name, tokenizer, decoder=True)
    ids, mask = encode(tokenizer)
    mask[1] = False
    logits = answer(encoder, ids, mask, ids, mask)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)


def test_it_starts_and_ends_as_the_tokenizer_does(tokenizer):
    said = torch.tensor([[2, 9, 3]])
    t5, bart = build("t5", tokenizer, decoder=True), build("bart", tokenizer, decoder=True)
    assert t5.shift(said).tolist() == [[0, 2, 9]], "T5 starts with padding"
    assert bart.shift(said).tolist() == [[3, 2, 9]], "BART starts with the end token"
    assert t5.backbone.net.config.eos_token_id == bart.backbone.net.config.eos_token_id == 3
    with_sentinels = build("t5", tokenizer, decoder=True, sentinels=7)
    assert len(with_sentinels.tokenizer.sentinel_ids) == 7
    assert len(with_sentinels.token_embedding) == tokenizer.vocab_size + 7
    assert len(reinitialized(with_sentinels, 0).token_embedding) == tokenizer.vocab_size + 7


def test_who_has_no_decoder_says_so(tokenizer):
    for name in ("transformers/bert", "open_clip/ViT-B-32"):
        with pytest.raises(RecipeError, match="has no decoder"):
            create(name, "text", tokenizer=tokenizer, decoder=True)
    with pytest.raises(RecipeError, match="is no text encoder"):
        create("transformers/whisper", "text", tokenizer=tokenizer)
    bart = build("bart", tokenizer, decoder=True)
    memory, long = bart(*encode(tokenizer)), torch.zeros(3, 40, dtype=torch.long)
    with pytest.raises(RecipeError, match="reads 32 ids, got 40"):
        bart.decode(long, long == 0, memory)
