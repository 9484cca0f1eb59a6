"""Fine-tuning: it learns what frozen features lack, on a copy, with the learning rates it says."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from mmssl import encoder as create
from mmssl.adaptation.probes import _trained, finetune, make_probe
from mmssl.adaptation.probes._layers import scale_by_depth
from mmssl.adaptation.probes._lora import add_adapters, merge
from mmssl.adaptation.probes._trained import Shuffled
from mmssl.adaptation.probes.base import RawRows
from mmssl.adaptation.probes.finetune import Finetune, Supervised
from mmssl.adaptation.rows import BatchSplit, Reads
from mmssl.adaptation.targets.classes import Classes
from mmssl.adaptation.targets.values import Values
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.training.optim import parameter_groups


def tinted(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, a little redder or a little bluer."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    tint = torch.tensor([[20.0, 0, -20], [-20, 0, 20]])[labels]
    noise = 60 * torch.randn(rows, 3, 16, 16, generator=random)
    return (128 + tint[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), labels


def raw(encoder, x: torch.Tensor) -> RawRows:
    """Pictures in batches of uneven sizes, as rows."""
    batches = [{"image": part} for part in x.split([5, len(x) - 5])]
    return RawRows(encoder, BatchSplit(batches, Reads(("image",), {})), torch.arange(len(x)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return create("timm/test_resnet", modality="image")


@pytest.mark.long
def test_it_learns_separable_classes_and_leaves_the_encoder_alone(small):
    x, labels = tinted(96, 0)
    y, truth = tinted(64, 1)
    small.train()
    state = {key: value.clone() for key, value in small.state_dict().items()}
    probe = Finetune(steps=30, batch_rows=16, lr=(3e-3,), decay=(1.0,))
    train, test = raw(small, x), raw(small, y)
    (answers,) = probe.predict(Classes(range(2)), train, labels, test, probe.settings(), 0)
    (again,) = probe.predict(Classes(range(2)), train, labels, test, probe.settings(), 0)
    assert (answers.argmax(1) == truth).float().mean() > 0.9
    torch.testing.assert_close(answers.sum(1), torch.ones(64))
    assert torch.equal(answers, again)
    assert small.training
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())
    assert not any(hasattr(p, "lr_scale") for p in small.parameters())


def test_a_decay_of_zero_trains_the_head_alone(small):
    x, labels = tinted(32, 0)
    small.eval()
    probe = Finetune(steps=3, batch_rows=8)
    objective = probe.train(Classes(range(2)), raw(small, x), labels, {"lr": 0.1, "decay": 0.0}, 0)
    after = dict(objective.encoder("image").named_parameters())
    assert all(torch.equal(value, after[key].cpu()) for key, value in small.named_parameters())
    assert objective.head.weight.abs().max() > 0.2


def test_the_head_is_one_linear_map_of_features_in_units_of_the_first_step(small):
    x, labels = tinted(32, 0)
    small.eval()
    target = Values(1)
    objective = Finetune(steps=2, batch_rows=32).train(
        target, raw(small, x), 100.0 + labels[:, None], {"lr": 0.01, "decay": 0.0}, 0
    )
    objective.train()  # statistics of BatchNorm are those of the batch, as in training
    with torch.no_grad():
        features = objective.encoder("image")(x.to(objective.center.device)).pooled
        seen = (features - objective.center) / objective.spread
        torch.testing.assert_close(seen.mean(0), torch.zeros_like(seen[0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(seen.square().mean(), torch.ones_like(objective.spread))
        weight, bias = objective.linear()
        outputs = objective.answer({"image": x.to(objective.center.device)}).cpu()
    torch.testing.assert_close(features.cpu() @ weight.T + bias, outputs)
    assert (outputs - 100.5).abs().max() < 5


def scales(encoder, decay: float) -> dict[str, float]:
    scale_by_depth(encoder, decay)
    return {name.removeprefix("backbone.net."): p.lr_scale for name, p in encoder.named_parameters()}


def test_layer_wise_rates_follow_the_rule_of_mae():
    found = scales(create("timm/test_vit", modality="image", img_size=32, patch_size=8), 0.5)
    blocks = 6
    assert found["pos_embed"] == found["patch_embed.proj.weight"] == 0.5 ** (blocks + 1)
    for i in range(blocks):
        assert found[f"blocks.{i}.attn.qkv.weight"] == 0.5 ** (blocks - i)
    assert found["norm.weight"] == 1.0


@pytest.mark.quick(1)
@pytest.mark.parametrize("model", ["timm/resnet18", "torchvision/resnet18", "timm/test_resnet"])
def test_layer_wise_rates_never_fall_toward_the_head(model):
    found = list(scales(create(model, modality="image"), 0.5).values())
    assert found == sorted(found)
    assert len(set(found)) > 4
    assert found[-1] == 0.5


def test_the_optimizer_gets_the_rates(small):
    scale_by_depth(small, 0.5)
    groups = parameter_groups(small, 0.05)
    assert {group["lr_scale"] for group in groups} == {p.lr_scale for p in small.parameters()}


def test_shuffled_rows_come_once_an_epoch_and_in_a_new_order():
    rows = raw(None, torch.arange(10).view(10, 1, 1, 1).expand(-1, 3, 2, 2))
    loader = Shuffled(rows, 10.0 * torch.arange(10)[:, None], batch_size=4, seed=0)
    batches = list(loader.batches(0, 5))
    assert all(torch.equal(batch["image"][:, 0, 0, 0] * 10.0, batch["label"][:, 0]) for batch in batches)
    seen = torch.cat([batch["id"] for batch in batches]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert torch.cat([batch["id"] for batch in loader.batches(3, 5)]).tolist() == seen[12:]


def test_a_training_says_now_and_then_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(_trained, "TELL", -1.0)
    rows = raw(None, torch.arange(10).view(10, 1, 1, 1).expand(-1, 3, 2, 2))
    loader = Shuffled(rows, torch.zeros(10, 1), batch_size=4, seed=0, what="learning labels, lr 0.1", total=9)
    with caplog.at_level("INFO", "mmssl"):
        assert len(list(loader.batches(2, 4))) == 2
    assert caplog.messages == ["learning labels, lr 0.1: step 2 of 9", "learning labels, lr 0.1: step 3 of 9"]


def test_on_the_command_line_such_lines_are_seen():
    said = "lambda **_: logging.getLogger('mmssl').info('step 2 of 9')"
    program = f"import logging\nfrom mmssl import cli\ncli.app = {said}\ncli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "step 2 of 9\n")


def trained(monkeypatch, probe, encoder, setting, rows=16):
    """What one training leaves, and of each of its steps whether the encoder learned."""
    steps, before = [], Supervised.before_step

    def look(self, step):
        before(self, step)
        steps.append(any(p.requires_grad for p in self.encoder("image").parameters()))

    monkeypatch.setattr(Supervised, "before_step", look)
    x, labels = tinted(rows, 0)
    return probe.train(Classes(range(2)), raw(encoder, x), labels, setting, 0), steps


def test_frozen_blocks_stay_as_they_are_with_their_statistics(small, monkeypatch):
    before = {key: value.clone() for key, value in small.state_dict().items()}
    # The stem has three convolutions and two norms with a number, then comes a block a stage.
    objective, _ = trained(monkeypatch, Finetune(steps=3, freeze=7), small, {"lr": 0.01, "decay": 1.0})
    after = objective.encoder("image").cpu().state_dict()
    same = {key for key, value in before.items() if torch.equal(value, after[key])}
    frozen = {key for key in before if any(part in key for part in ("net.conv1", "net.bn1", "layer1.", "layer2."))}
    assert any("running_mean" in key for key in frozen)
    assert same - {"normalize.mean", "normalize.std"} == frozen
    with pytest.raises(RecipeError, match=r"freeze = 99: timm/test_resnet has \d+ blocks"):
        trained(monkeypatch, Finetune(steps=3, freeze=99), small, {"lr": 0.01, "decay": 1.0})


def test_the_head_learns_first(small, monkeypatch):
    probe = Finetune(steps=2, head_steps=3)
    objective, steps = trained(monkeypatch, probe, small, {"lr": 0.01, "decay": 1.0})
    assert steps == [False] * 3 + [True] * 2
    alone, _ = trained(monkeypatch, Finetune(steps=2), small, {"lr": 0.01, "decay": 1.0})
    assert not torch.equal(objective.head.weight, alone.head.weight)
    assert all(p.requires_grad for p in objective.encoder("image").parameters())


def test_early_stopping_looks_at_held_out_rows_and_ends_the_last_training_there(small, monkeypatch):
    x, labels = tinted(40, 0)
    probe = Finetune(steps=40, batch_rows=16, lr=(3e-3,), decay=(1.0,), early_stop=2)
    scores, seen = iter([0.5, 0.9, 0.7, 0.9, 1.0]), []

    def score(self, said, truth):
        return {"accuracy": next(scores)}

    def read(objective, rows, size):
        seen.append(rows.ids.tolist())
        return answers(objective, rows, size)

    answers = finetune.answers
    monkeypatch.setattr(finetune, "answers", read)
    monkeypatch.setattr(Classes, "score", score)
    setting, best = probe.choose(Classes(range(2)), raw(small, x), labels, 0)
    assert (setting, best) == ({"lr": 3e-3, "decay": 1.0, "steps": 4}, 0.9)
    assert next(scores) == 1.0  # the fourth evaluation was the last
    held = Classes(range(2)).hold_out(labels, 0.2, 0)
    assert seen == [held.nonzero()[:, 0].tolist()] * 4
    _, steps = trained(monkeypatch, probe, small, setting)
    assert len(steps) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixup": -1}, "mixup = -1 should be float from 0"),
        ({"freeze": 1.5}, "freeze = 1.5 should be int from 0"),
        ({"early_stop": -1}, "early_stop = -1 should be int from 0"),
        ({"decay": [2.0]}, r"decay = \[2.0\] should be"),
        ({"lora": 2, "freeze": 1}, "with lora no block learns; leave freeze out"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(RecipeError, match=said):
        make_probe("finetune", options)


def vit():
    return create("timm/test_vit", modality="image", img_size=16, patch_size=8)


def bert():
    tokenizer = Tokenizer.train(["a red circle", "two small blue squares"] * 3, 300)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return create("transformers/bert", modality="text", tokenizer=tokenizer, **size)


@pytest.mark.parametrize("make", [vit, bert])
def test_adapters_alone_learn_and_merge_into_equal_outputs(make):
    torch.manual_seed(0)
    encoder = make().double().eval()
    pictures = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    x = encoder.read(["two squares", "a circle"]).x if make is bert else pictures
    names, start = set(encoder.state_dict()), encoder(x).pooled
    objective = Supervised(encoder, Classes(range(2)), (torch.zeros(2), torch.ones(2)))
    adapters = add_adapters(encoder, 2)
    torch.testing.assert_close(encoder(x).pooled, start)
    learning = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in learning)
    assert sum("lora_A" in name for name in learning) == sum(
        isinstance(module, nn.Linear) for module in make().backbone.net.modules()
    )
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    apart = encoder(x).pooled
    merge(adapters)
    assert set(encoder.state_dict()) == names
    torch.testing.assert_close(encoder(x).pooled, apart, atol=1e-6, rtol=1e-6)
    assert (apart - start).abs().max() > 1e-3


def test_lora_as_an_option(monkeypatch):
    torch.manual_seed(0)
    encoder = vit()
    before = encoder.state_dict()
    objective, _ = trained(monkeypatch, Finetune(steps=2, lora=2), encoder, {"lr": 0.1, "decay": 1.0})
    after = objective.encoder("image").cpu().state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.endswith("weight") and any(n in key for n in ("attn.", "mlp."))}
    with pytest.raises(RecipeError, match="lora = 2: timm/test_resnet has no linear layers; lora is for transformers"):
        add_adapters(create("timm/test_resnet", modality="image"), 2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r'lora takes the library peft: pip install "mmssl\[lora\]"'):
        Finetune(lora=2)


def test_mixing_is_for_pictures_and_clips():
    with pytest.raises(RecipeError, match="mixup and cutmix mix pictures and clips, and this encoder reads text"):
        Supervised(bert(), Classes(range(2)), (torch.zeros(2), torch.ones(2)), mixup=0.2)
