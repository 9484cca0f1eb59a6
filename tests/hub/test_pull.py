"""A folder that someone else wrote is data: damaged or hostile, it gives an error and nothing in it runs."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import PAIRS, ROTATION, make_run, outputs

import mmssl
from mmssl.errors import MmsslError, RunError
from mmssl.hub import check_folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A run directory as published: no state."""
    folder = tmp_path_factory.mktemp("pull") / "run"
    make_run(folder, PAIRS)
    shutil.rmtree(folder / "state")
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run"))


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """A file that exists once code from the folder has run."""
    path = tmp_path / "executed"
    monkeypatch.setenv("CANARY", str(path))
    yield path
    assert not path.exists(), "code from the folder was executed"


class Payload:
    def __reduce__(self) -> tuple:
        return os.system, ('touch "$CANARY"',)


def edit(folder: Path, change) -> None:
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    change(tree)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))


def test_a_sound_folder_passes(folder) -> None:
    recipe = check_folder(folder)
    assert recipe.objective == {"name": "contrastive", "width": 8}
    assert outputs(mmssl.load(folder)).keys() == {"image", "text"}


@pytest.mark.parametrize("name", ["recipe.yaml", "model.safetensors"])
def test_missing_file_is_named(folder, name) -> None:
    (folder / name).unlink()
    with pytest.raises(RunError, match=name):
        mmssl.load(folder)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_is_not_read(folder, canary, protocol) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(), protocol))
    with pytest.raises(RunError, match="not a whole safetensors file"):
        mmssl.load(folder)


def test_a_torch_archive_is_not_read(folder, canary) -> None:
    torch.save(Payload(), folder / "model.safetensors")
    torch.save(Payload(), folder / "pytorch_model.bin")
    with pytest.raises(RunError, match="not a whole safetensors file"):
        mmssl.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated_weights(folder, keep) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match="not a whole safetensors file"):
        mmssl.load(folder)


def header(tensors: dict, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{}",
        header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 40]}}, b"\0" * 4),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header({}),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_lying_headers(folder, content) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"model\.safetensors"):
        check_folder(folder)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_tensor_must_be_there_and_none_besides(folder) -> None:
    rewrite(folder, lambda tensors: tensors.pop("project_a.weight"))
    with pytest.raises(RunError, match=r"1 tensors missing.*project_a\.weight"):
        mmssl.load(folder)


def test_unknown_tensors_are_refused(folder) -> None:
    rewrite(folder, lambda tensors: tensors.update({"../../evil": torch.zeros(1)}))
    with pytest.raises(RunError, match=r"1 unknown.*evil"):
        mmssl.load(folder)


def test_shapes_must_be_those_of_the_recipe(folder) -> None:
    rewrite(folder, lambda tensors: tensors.update({"project_a.weight": torch.zeros(3, 16)}))
    with pytest.raises(RunError, match=r"project_a\.weight has shape \(3, 16\)"):
        mmssl.load(folder)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch \"$CANARY\"']",
        "objective: !!python/name:os.system ''\nencoders: {}\ndata: toy",
        "encoders: [unclosed",
        "just words",
        "- a list",
        "\x00\x01",
        "a: &a [1, 1]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(3)),
        "a: " + "[" * 2000 + "]" * 2000,
        "{" * 5000,
        "a: b\n" * 1_000_000,
    ],
    ids=["apply", "name", "unclosed", "words", "list", "control", "aliases", "deep", "deeper", "huge"],
)
def test_hostile_recipes(folder, canary, text) -> None:
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(RunError, match=r"recipe\.yaml"):
        mmssl.load(folder)


def test_recipe_is_validated(folder) -> None:
    edit(folder, lambda tree: tree.update(objectiv={}))
    with pytest.raises(MmsslError, match="did you mean 'objective'"):
        mmssl.load(folder)


@pytest.fixture
def module(tmp_path, monkeypatch, canary) -> str:
    """An importable module outside the library, which says that it was imported."""
    package = tmp_path / "outside_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nopen(os.environ['CANARY'], 'w').close()\n")
    (package / "task.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "outside_pkg.task"


@pytest.mark.parametrize(
    "change",
    [
        lambda tree, name: tree.update(objective={"name": name}),
        lambda tree, name: tree.update(objective={"name": "combine", "tasks": {"t": {"name": name}}}),
        lambda tree, name: tree.update(objective={"name": "combine", "tasks": [{"name": name}]}),
        lambda tree, name: tree["encoders"]["image"].update(modality=name),
        lambda tree, name: tree["encoders"].update({name: {"model": "timm/resnet18"}}),
    ],
    ids=["objective", "combined", "listed", "modality", "encoder"],
)
def test_code_outside_the_library_needs_trust(folder, module, change) -> None:
    edit(folder, lambda tree: change(tree, module))
    with pytest.raises(RunError, match=r"outside_pkg\.task.*trust=True"):
        mmssl.load(folder)


def test_trust_allows_other_objectives(folder) -> None:
    edit(folder, lambda tree: tree.update(objective={"name": "outside_pkg.task"}))
    assert check_folder(folder, trust=True).objective["name"] == "outside_pkg.task"


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": "transformers/vit", "trust_remote_code": True},
        {"model": "transformers/vit", "auto_map": {"AutoModel": "x.Y"}},
        {"model": "transformers/vit", "use_kernels": True},
        {"model": "torchvision/resnet18", "weights": "DEFAULT"},
        {"attn_implementation": "somebody/kernel"},
        {"checkpoint_path": "weights"},
        {"pretrained_cfg": {"file": "weights.bin"}},
        {"pretrained_cfg_overlay": {"hf_hub_id": "a"}},
        {"model": "open_clip/ViT-B-32", "text_cfg": {"hf_model_name": "roberta-base"}},
        {"layers": [{"name": "hf-hub:somebody/model"}]},
        {"model": "timm/hf-hub:somebody/model"},
        {"model": "timm/local-dir:../elsewhere"},
        {"model": "transformers/../elsewhere"},
        {"model": "transformers/somebody/model"},
        {"model": "open_clip//etc"},
    ],
    ids=str,
)
def test_encoders_may_not_fetch(folder, arguments) -> None:
    edit(folder, lambda tree: tree["encoders"]["image"].update(arguments))
    with pytest.raises(RunError, match="read other files or run code"):
        check_folder(folder)


def test_pretrained_weights_are_not_fetched(folder, sound) -> None:
    edit(folder, lambda tree: tree["encoders"]["image"].update(pretrained="/nowhere/weights.bin"))
    before, after = outputs(mmssl.load(sound)), outputs(mmssl.load(folder))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["recipe.yaml", "model.safetensors", "metrics.jsonl", "probes.json"])
def test_links_may_not_leave_the_folder(folder, tmp_path, name) -> None:
    (folder / name).replace(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(RunError, match=f"{name}: is a link that leaves the folder"):
        mmssl.load(folder)


def test_links_of_tokenizers_may_not_leave_the_folder(folder, tmp_path) -> None:
    shutil.move(folder / "tokenizers" / "text", tmp_path / "text")
    (folder / "tokenizers" / "text").symlink_to(tmp_path / "text")
    with pytest.raises(RunError, match="is a link that leaves the folder"):
        mmssl.load(folder)


def test_links_of_the_hub_cache_are_fine(sound, tmp_path) -> None:
    cache = tmp_path / "models--me--pairs"
    snapshot = cache / "snapshots" / ("0" * 40)
    for number, path in enumerate(path for path in sound.rglob("*") if path.is_file()):
        (cache / "blobs").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, cache / "blobs" / str(number))
        link = snapshot / path.relative_to(sound)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / str(number))
    check_folder(snapshot)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.py", "import os", "not a tokenizer file"),
        ("tokenizer.pkl", "", "not a tokenizer file"),
        ("tokenizer.json", '{"cut', "not valid JSON"),
        ("tokenizer.json", "[]", "expected a JSON object"),
        ("tokenizer.json", "[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}', "auto_map"),
        ("open_clip_tokenizer.json", '{"name": "hf-hub:somebody/model"}', "not a model of open_clip"),
        ("open_clip_tokenizer.json", '{"name": "local-dir:../elsewhere"}', "not a model of open_clip"),
        ("deeper/tokenizer.json", "{}", "not a tokenizer file"),
        ("../tokenizer.json", "{}", "not a tokenizer file"),
    ],
)
def test_hostile_tokenizers(folder, canary, name, content, said) -> None:
    path = folder / "tokenizers" / "text" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(RunError, match=said):
        mmssl.load(folder)


def test_tokenizer_that_means_nothing(folder) -> None:
    (folder / "tokenizers" / "text" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(MmsslError):
        mmssl.load(folder)


@pytest.mark.parametrize(
    "line", ['{"step": "x"}', "{broken}", "{}", '{"step": null}', '{"a":' * 50_000 + "}", '{"step": 1, "loss": "x"}']
)
def test_damaged_metrics(folder, line) -> None:
    (folder / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        mmssl.load(folder)


def test_metrics_that_a_killed_run_left(folder) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    assert mmssl.load(folder).step == 10


def test_no_such_folder_is_looked_up_on_the_hub(tmp_path) -> None:
    with pytest.raises(RunError, match="no such run directory"):
        check_folder(tmp_path / "none")
    with pytest.raises(RunError, match="no folder"):
        mmssl.load(tmp_path / "none")


@pytest.mark.parametrize("name", ["runs/a/b", "/runs/a", "../a", "a..b"])
def test_no_such_folder_whose_path_names_no_repository(name) -> None:
    with pytest.raises(RunError, match=f"there is no folder '{name}'.*: no repository can have such a name"):
        mmssl.load(name)


def test_rotation_reads_back_bit_for_bit(tmp_path) -> None:
    run = make_run(tmp_path / "run", ROTATION)
    again = mmssl.load(run.directory)
    stored = load_file(run.directory / "model.safetensors")
    assert all(torch.equal(value, again.objective.state_dict()[name]) for name, value in stored.items())
