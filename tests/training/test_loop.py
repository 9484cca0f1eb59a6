"""The loop: the same run on any number of processes and micro-batches, resumed or not."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import Denoise, MemoryLoader, Pull, free_port, make

from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import DataError, Interrupted, RecipeError, RunError
from mmssl.objectives.base import Step
from mmssl.recipe import Optimizer, Schedule, Training
from mmssl.training import checkpoint
from mmssl.training.launch import cut_norms, start_processes
from mmssl.training.loop import fit
from mmssl.training.step import ForwardPass, accumulated_backward

TASKS = {"denoise": Denoise, "pull": Pull}


def settings(**changes: object) -> Training:
    base = {
        "steps": 20,
        "batch_size": 8,
        "precision": "fp64",
        "log_every": 1,
        "save_every": 5,
        "optimizer": Optimizer(lr=0.02),
        "clip": 0.5,
    }
    changed = base | changes
    return Training.model_validate({"schedule": Schedule(warmup=min(3, changed["steps"] - 1))} | changed)


def numbers(history: list[dict]) -> list[list[float]]:
    keys = ("step", "loss", "accuracy", "lr", "gradient_norm", "same_rows/loss", "monitor/image/rank")
    return [[record.get(key, 0.0) for key in keys] for record in history]


def train(task: str, **changes: object) -> list[list[float]]:
    return numbers(fit(make(TASKS[task]), MemoryLoader(), settings(**changes), quiet=True))


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    start_processes()
    curves = {f"{task} {k}": train(task, accumulate=k) for task in TASKS for k in (1, 2)}
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(curves))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def single() -> dict[str, list[list[float]]]:
    return {task: train(task) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_loss_falls(single: dict, task: str) -> None:
    losses = [record[1] for record in single[task][1:]]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.quick(2)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("parts", [2, 4])
def test_same_curve_with_accumulation(single: dict, task: str, parts: int) -> None:
    assert torch.allclose(torch.tensor(train(task, accumulate=parts)), torch.tensor(single[task]), atol=1e-10, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_same_curve_on_several_processes(single: dict, world: int, tmp_path: Path, processes: Callable) -> None:
    processes(_worker, (world, free_port(), str(tmp_path)), world)
    curves = json.loads((tmp_path / f"{world}.json").read_text())
    for name, curve in curves.items():
        expected = torch.tensor(single[name.split()[0]])
        assert torch.allclose(torch.tensor(curve), expected, atol=1e-9, rtol=0), name


def test_dropout_repeats_in_the_replay() -> None:
    """With dropout, cached accumulation must replay the masks of its first pass: the gradients fit the loss."""
    torch.manual_seed(0)
    task = make(Pull, dropout=0.5).double()
    inputs = {"views": torch.rand(8, 2, 3, 8, 8, dtype=torch.float64)}
    accumulated_backward(ForwardPass(task), inputs, 2, reseed=lambda part: torch.manual_seed(part))
    got = {name: p.grad.clone() for name, p in task.named_parameters()}
    task.zero_grad()
    outputs = []
    for part in range(2):
        torch.manual_seed(part)
        outputs.append(task.predict({"views": inputs["views"][part * 4 : part * 4 + 4]})["z"])
    task.loss({"z": torch.cat(outputs)}, inputs)["loss"].backward()
    for name, p in task.named_parameters():
        assert torch.allclose(p.grad, got[name], atol=1e-12), name


def test_replay_counts_batch_statistics_once() -> None:
    task = make(Pull)
    task.encoders["image"].net[1] = torch.nn.BatchNorm1d(16)
    accumulated_backward(ForwardPass(task), {"views": torch.rand(8, 2, 3, 8, 8)}, 2)
    assert task.encoders["image"].net[1].num_batches_tracked == 2


def final_state(directory: Path) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    from safetensors.torch import load_file

    history = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return load_file(directory / checkpoint.WEIGHTS), numbers(history)


def assert_same_run(a: Path, b: Path) -> None:
    (weights_a, metrics_a), (weights_b, metrics_b) = final_state(a), final_state(b)
    assert weights_a.keys() == weights_b.keys()
    for name, value in weights_a.items():
        assert torch.equal(value, weights_b[name]), name
    assert metrics_a == metrics_b


def test_micro_batches_of_a_task_with_batch_norm_are_told() -> None:
    task = make(Pull)
    assert cut_norms(task, settings(accumulate=2)) is None
    task.norm = torch.nn.BatchNorm1d(4)
    assert cut_norms(task, settings()) is None
    assert "BatchNorm sees micro-batches of 4 rows" in str(cut_norms(task, settings(accumulate=2)))


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("task", "optimizer"), [*((task, "adamw") for task in TASKS), *(("pull", name) for name in ("sgd", "lars", "lamb"))]
)
def test_resumed_run_has_the_same_bits(task: str, optimizer: str, tmp_path: Path) -> None:
    training = settings(optimizer={"name": optimizer, "lr": 0.02})
    fit(make(TASKS[task]), MemoryLoader(), training, tmp_path / "whole", quiet=True)

    class Stops(MemoryLoader):
        def batches(self, start: int, stop: int):  # type: ignore[no-untyped-def]
            for step, batch in enumerate(super().batches(start, stop), start):
                if step == 13:
                    raise ConnectionError("unplugged")
                yield batch

    with pytest.raises(ConnectionError):
        fit(make(TASKS[task]), Stops(), training, tmp_path / "parts", quiet=True)
    assert checkpoint.newest(tmp_path / "parts").name == "step_00000010"
    history = fit(make(TASKS[task], seed=7), MemoryLoader(), training, tmp_path / "parts", resume=True, quiet=True)
    assert [record["step"] for record in history] == list(range(21))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def _save_each_step(directory: Path) -> None:
    torch.set_num_threads(1)
    fit(make(Pull), MemoryLoader(), settings(steps=200, save_every=1), directory, resume=True, quiet=True)


@pytest.mark.long
def test_killed_at_random_moments(tmp_path: Path, forkserver: BaseContext) -> None:
    """SIGKILL at several moments, some inside a save, then a resume to the end: the same bits."""
    fit(make(Pull), MemoryLoader(), settings(steps=200, save_every=1), tmp_path / "whole", quiet=True)
    directory = tmp_path / "killed"
    steps = []
    for delay in (0.05, 0.4, 0.23, None):
        before = checkpoint.newest(directory)
        process = forkserver.Process(target=_save_each_step, args=(directory,))
        process.start()
        if delay is None:
            process.join(120)
            assert process.exitcode == 0
        else:
            deadline = time.monotonic() + 200
            while checkpoint.newest(directory) == before and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(delay)
            process.kill()
            process.join()
        steps.append(checkpoint.read_state(checkpoint.newest(directory))["step"])
    assert steps == sorted(steps)
    assert 0 < steps[0] < 200, "the kill came too late to prove anything"
    assert_same_run(tmp_path / "whole", directory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    class Signals(MemoryLoader):
        def batches(self, start: int, stop: int):  # type: ignore[no-untyped-def]
            for step, batch in enumerate(super().batches(start, stop), start):
                if step == 7:
                    os.kill(os.getpid(), number)
                yield batch

    with pytest.raises(Interrupted, match=r"stopped at step 8 of 20"):
        fit(make(Pull), Signals(), settings(), tmp_path, quiet=True)
    assert checkpoint.newest(tmp_path).name == "step_00000008"
    assert signal.getsignal(number) is not None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("a compiler was killed"),
            r"before the step was done \(RuntimeError\); go on with --resume",
        ),
        (DataError("a worker died"), r"stopped before the step was done \(DataError\); go on with --resume"),
        (RunError("the state cannot be saved"), "the state cannot be saved"),
    ],
)
def test_what_a_signal_ends_as_well_is_not_what_went_wrong(error: Exception, said: str) -> None:
    class Ended(MemoryLoader):
        def batches(self, start: int, stop: int):  # type: ignore[no-untyped-def]
            yield from super().batches(start, start + 1)
            os.kill(os.getpid(), signal.SIGTERM)
            raise error

    with pytest.raises(RunError if isinstance(error, RunError) else Interrupted, match=said):
        fit(make(Pull), Ended(), settings(), quiet=True)


def _run_out_of_room(directory: Path, said: Connection) -> None:
    class Shrinks(MemoryLoader):
        def batches(self, start: int, stop: int):  # type: ignore[no-untyped-def]
            for step, batch in enumerate(super().batches(start, stop), start):
                if step == 7:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
                yield batch

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        fit(make(Pull), Shrinks(), settings(log_every=20, save_every=5), directory, quiet=True)
    except RunError as error:
        said.send(str(error))


@pytest.mark.long
def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, forkserver: BaseContext) -> None:
    """A limit on the size of files stands for a full disk: the operating system refuses the write half-way."""
    heard, said = forkserver.Pipe()
    process = forkserver.Process(target=_run_out_of_room, args=(tmp_path, said))
    process.start()
    assert heard.poll(120)
    sentence = heard.recv()
    process.join()
    assert "could not save step 10" in sentence
    assert "step_00000005 is whole" in sentence
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step_00000005"]
    history = fit(make(Pull), MemoryLoader(), settings(), tmp_path, resume=True, quiet=True)
    assert history[-1]["step"] == 20


def test_not_finite_loss_is_named(tmp_path: Path) -> None:
    class Broken(Denoise):
        def loss(self, outputs, inputs):  # type: ignore[no-untyped-def]
            return {"loss": super().loss(outputs, inputs)["loss"] * float("nan")}

    with pytest.raises(RunError, match=r"not finite at step 1, of rows .*; start again with a lower"):
        fit(make(Broken), MemoryLoader(), settings(), tmp_path, quiet=True)


def test_weight_decay_moves_over_the_run() -> None:
    """From 0 to 50 halves the weights only late; a constant 0 and a constant 50 are other runs."""
    ends = {}
    for start, end in ((0.0, None), (0.0, 50.0), (50.0, None)):
        task = make(Denoise)
        optimizer = Optimizer(name="sgd", lr=0.01, momentum=0.0, weight_decay=start, weight_decay_end=end)
        fit(
            task, MemoryLoader(), settings(steps=6, optimizer=optimizer, schedule=Schedule(name="constant")), quiet=True
        )
        ends[start, end] = float(task.head.weight.detach().norm())
    assert ends[50.0, None] < ends[0.0, 50.0] < ends[0.0, None]
    # The decay is 50 x (1 - cos(pi x step / 6)) / 2: the weights shrink by the product of 1 - 0.01 of it.
    shrink = math.prod(1 - 0.01 * 25 * (1 - math.cos(math.pi * step / 6)) for step in range(6))
    assert ends[0.0, 50.0] / ends[0.0, None] == pytest.approx(shrink, rel=0.05)


class Looks(Denoise):
    """Counts the batches of the data, logs its own loss and a gradient, and remembers what it was given."""

    def __init__(self, encoders: dict[str, Encoder]) -> None:
        super().__init__(encoders)
        self.numbers: list[int] = []
        self.read: list[int] = []
        self.inputs: list[int] = []

    def before_step(self, step: Step) -> None:
        self.numbers.append(step.number)
        if step.number % 10 == 0:
            self.read += [sum(1 for _ in step.data()) for _ in range(2)]
        if step.number % 7 == 3:
            self.inputs.append(id(step.inputs))
            gradients = step.gradients(self, step.inputs)
            assert gradients.keys() == dict(self.named_parameters()).keys()
            step.log({"bias": gradients["head.bias"].norm(), "own": self(step.inputs)["loss"].detach()})

    def predict(self, inputs: Batch) -> Batch:
        self.inputs.append(id(inputs["image"]))
        return super().predict(inputs)


def test_before_each_step_a_task_sees_data_inputs_and_gradients_and_the_run_is_the_same() -> None:
    loader = MemoryLoader()
    loader.steps_per_epoch = 3  # type: ignore[attr-defined]
    task = make(Looks)
    history = fit(task, loader, settings(steps=12, log_every=5), quiet=True)
    assert task.numbers == list(range(12))
    assert task.read == [3] * 4
    assert [record["step"] for record in history] == [0, 4, 5, 10, 11, 12]
    assert ["own" in record for record in history] == [False, True, False, False, True, False]
    for record in history:
        if "own" in record:  # what it measured was trained on
            assert record["own"] == pytest.approx(record["loss"], rel=1e-12)
    plain = fit(make(Denoise), MemoryLoader(), settings(steps=12), quiet=True)
    assert [record["loss"] for record in history] == [plain[record["step"]]["loss"] for record in history]


def test_inputs_are_made_once_and_a_look_at_a_task_makes_none() -> None:
    made: list[int] = []
    step = Step(0, data=list, prepare=lambda: made.append(1) or {"a": torch.ones(2)})
    assert step.inputs is step.inputs
    assert made == [1]
    assert Step(0, data=list).inputs == {}
    with pytest.raises(RecipeError, match=r"objective.blind is measured on whole weights.* set objective.blind=0"):
        Step(0, data=list, sharded=True).need_whole_weights("objective.blind")
    step.need_whole_weights("objective.blind")


def test_the_pass_is_compiled_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(ForwardPass, "compile", lambda self: called.append(self.objective))
    task = make(Denoise)
    fit(task, MemoryLoader(), settings(steps=4, compile=True), quiet=True)
    assert called == [task]


def test_tensorboard_is_always_written_and_an_unknown_tracker_is_named(tmp_path: Path) -> None:
    fit(make(Pull), MemoryLoader(), settings(steps=4), tmp_path, quiet=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    with pytest.raises(RecipeError, match=r"training.trackers: 'tensorbord' .*did you mean 'tensorboard'"):
        fit(make(Pull), MemoryLoader(), settings(trackers=("tensorbord",)), tmp_path / "other", quiet=True)
