"""A checkpoint brings everything back bit for bit, or says why not; there is always one to go on from."""

import errno
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd_dist import checkpoint
from kd_dist.checkpoint import (
    Progress,
    best_digest,
    latest,
    load,
    read_record,
    save,
    save_best,
    save_weights,
    settle_best,
    write_atomic,
)
from kd_dist.errors import TrainingError

IDENTITY = {"stage": {"lr": 0.1, "losses": {"kd": {"temperature": 4}}}, "seed": 0}
PROGRESS = Progress(
    step=3,
    skipped=1,
    best=0.75,
    best_epoch=0,
    history=[{"epoch": 0, "loss": 0.1 + 0.2, "val_accuracy": 0.75, "retention": None}],
)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [v for v in module.parameters() if v.ndim > 1], "weight_decay": 0.05}]
    groups += [{"params": [v for v in module.parameters() if v.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9)


def plain_sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.0)


OPTIMIZERS = [adamw, momentum, plain_sgd]


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = module(torch.randn(8, 3, 8, 8, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sha(module: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every bit of the weights and of the optimiser's state."""
    digest = hashlib.sha256()
    state = optimizer.state_dict()
    entries = [*module.state_dict().items()]
    entries += [(f"{number}.{name}", value) for number, one in state["state"].items() for name, value in one.items()]
    for name, value in sorted(entries, key=lambda entry: entry[0]):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    digest.update(json.dumps(state["param_groups"], sort_keys=True).encode())
    return digest.hexdigest()


Saved = tuple[Path, nn.Module, torch.optim.Optimizer]


def put(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress=PROGRESS, identity=IDENTITY
) -> None:
    save(folder, module.state_dict(), optimizer.state_dict(), progress, identity)


def take(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, identity: dict = IDENTITY) -> Progress:
    weights, moments, progress = load(path, identity)
    module.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    return progress


def trained(step: int, make=adamw) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = model()
    optimizer = make(module)
    train(module, optimizer, range(step))
    return module, optimizer


def progress_of(step: int) -> Progress:
    return Progress(**{**vars(PROGRESS), "step": step})


def saved(folder: Path, step: int = 3, make=adamw, identity: dict = IDENTITY) -> Saved:
    module, optimizer = trained(step, make)
    put(folder, module, optimizer, progress_of(step), identity)
    return latest(folder), module, optimizer


def loaded(path: Path, identity: dict = IDENTITY, make=adamw, module: nn.Module | None = None) -> Progress:
    module = module or model(1)
    return take(path, module, make(module), identity)


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("step", [0, 3])
def test_everything_comes_back_bit_for_bit(tmp_path, make, step):
    path, module, optimizer = saved(tmp_path, step, make)
    other = model(1)
    its = make(other)
    for group in its.param_groups:
        group["lr"] = 7.0
    progress = take(path, other, its)
    assert progress == Progress(**{**vars(PROGRESS), "step": step})
    assert sha(other, its) == sha(module, optimizer)
    train(module, optimizer, range(3, 6))
    before = sha(other, its)
    train(other, its, range(3, 6))
    assert sha(other, its) == sha(module, optimizer) != before


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_saving_what_was_loaded_writes_the_same_bytes(tmp_path, make):
    path, _, _ = saved(tmp_path / "a", make=make)
    module = model(1)
    optimizer = make(module)
    progress = take(path, module, optimizer)
    put(tmp_path / "b", module, optimizer, progress)
    files = sorted(one.name for one in path.iterdir())
    assert files == ["model.safetensors", "optimizer.safetensors", "state.json"]
    for name in files:
        assert (path / name).read_bytes() == (tmp_path / "b" / path.name / name).read_bytes()


def test_tied_weights_are_saved(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight

    module = Tied()
    put(tmp_path, module, adamw(module))
    fresh = Tied()
    take(latest(tmp_path), fresh, adamw(fresh))
    assert torch.equal(fresh.other.weight, module.one.weight)


def test_weights_alone(tmp_path):
    module = model().half()
    module[0].weight.data = module[0].weight.data.to(memory_format=torch.channels_last)
    save_weights(module.state_dict(), tmp_path / "best.safetensors")
    state = load_file(tmp_path / "best.safetensors")
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_better_weights_take_their_place_once_a_checkpoint_tells_of_them(tmp_path):
    best, (one, other) = tmp_path / "best.safetensors", (model(seed).state_dict() for seed in (0, 1))
    first = save_best(one, best)
    settle_best(best, first)
    assert best_digest(best, first) == best_digest(best, None) == hashlib.sha256(best.read_bytes()).hexdigest() == first
    second = save_best(other, best)
    assert best_digest(best, first) == first != second  # the run is killed now: its checkpoint tells of the first
    settle_best(best, first)
    assert best_digest(best, first) == first
    assert save_best(other, best) == second  # the run is killed after its next checkpoint
    settle_best(best, second)
    assert best_digest(best, second) == second
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_best_weights_that_are_lost_or_changed_are_refused(tmp_path):
    best = tmp_path / "best.safetensors"
    digest = save_best(model().state_dict(), best)
    settle_best(best, digest)
    content = bytearray(best.read_bytes())
    content[-1] ^= 1
    best.write_bytes(content)
    with pytest.raises(TrainingError) as caught:
        best_digest(best, digest)
    assert str(caught.value) == (
        f"{best}: is damaged, its sha256 has changed; delete its folder and train the stage again"
    )
    best.unlink()
    for wanted in (digest, None):
        with pytest.raises(TrainingError) as caught:
            best_digest(best, wanted)
        assert str(caught.value) == f"{best}: is lost; delete its folder and train the stage again"


def test_a_checkpoint_of_before_the_best_weights_had_a_digest(tmp_path):
    path, _, _ = saved(tmp_path)
    record = json.loads((path / "state.json").read_text())
    del record["digest"], record["progress"]["best_sha256"]
    (path / "state.json").write_text(json.dumps({**record, "digest": checkpoint.digest(record)}))
    assert loaded(path) == PROGRESS and PROGRESS.best_sha256 is None


def test_a_small_text_is_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    for text in ("first", "ä"):
        write_atomic(path, text)
        assert path.read_text() == text
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "ä"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"steps"', '{"identity": 1}', "[" * 100_000, "\ufffe"])
def test_a_damaged_record_is_one_sentence(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(TrainingError, match=rf"(?s)^{path}: is damaged \(.+\); delete it and run the same command"):
        read_record(path, "identity", "steps")
    write_atomic(path, '{"identity": 1, "steps": 2, "more": 3}')
    assert read_record(path, "identity", "steps") == {"identity": 1, "steps": 2, "more": 3}


# ------------------------------------------------------------------------------------------------ what is none


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_a_torn_checkpoint(tmp_path, name):
    path, _, _ = saved(tmp_path)
    file = path / name
    whole = file.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(
            TrainingError, match=rf"(?s)^{path}: (state.json )?cannot be read \(.+\); delete the folder to start"
        ):
            loaded(path)
    file.unlink()
    with pytest.raises(TrainingError, match=f"^{path}: .*cannot be read .*No such file"):
        loaded(path)


def test_every_flipped_byte_is_found(tmp_path):
    """In the tensors by their digests; in the text because it is no JSON any more, or by what it then says."""
    path, module, _ = saved(tmp_path, make=plain_sgd)
    before, found = sha(module, plain_sgd(module)), 0
    for name in ("model.safetensors", "state.json"):
        whole = (path / name).read_bytes()
        places = range(0, len(whole), 1 if name == "state.json" else 97)
        for place in places:
            changed = bytearray(whole)
            changed[place] ^= 0x11
            (path / name).write_bytes(changed)
            other = model(1)
            try:
                assert loaded(path, make=plain_sgd, module=other) and name == "state.json"
                assert sha(other, plain_sgd(other)) == before  # a blank
            except TrainingError as error:
                assert str(path) in str(error)
                found += 1
        (path / name).write_bytes(whole)
    assert found >= 900


def test_a_state_of_another_shape_is_refused(tmp_path):
    path, _, _ = saved(tmp_path)
    for text in ("[]", "1", '{"version": 2}', "[" * 100_000, '{"version": 2, "identity": 3}'):
        (path / "state.json").write_text(text)
        with pytest.raises(TrainingError, match=f"^{path}: "):
            loaded(path)


def signed(path: Path, **changes: object) -> None:
    """Change values of a checkpoint's state, each under its dotted place, and sign it anew."""
    record = json.loads((path / "state.json").read_text())
    del record["digest"]
    for place, value in changes.items():
        *places, last = place.split("__")
        functools.reduce(lambda one, name: one[int(name) if name.isdigit() else name], places, record)[last] = value
    (path / "state.json").write_text(json.dumps({**record, "digest": checkpoint.digest(record)}))


NONSENSE = [
    *(("optimizer__groups", value) for value in (5, None, "ab", [1, 2], [{}], [{"params": [0, 2]}], [{"params": "a"}])),
    *(("optimizer__groups__0__betas", value) for value in ("0.9", ["0.9", "0.999"], [0.9], None)),
    *((f"optimizer__groups__0__{name}", "much") for name in ("lr", "eps", "weight_decay")),
    ("optimizer__groups__0__params", [0]),
    *(("progress__scale", value) for value in (0, -1.0, "high")),
    ("progress__lr_factor", 0.0),
    *(("progress__step", value) for value in (10**9, 4, -1, "3")),
    ("progress__precision", "bogus"),
    ("progress__history", [3]),
    ("progress__so_far", 3),
    ("progress__best_sha256", 3),
]


@pytest.mark.parametrize(("place", "value"), NONSENSE)
def test_a_state_that_is_signed_but_makes_no_sense_is_refused(tmp_path, place, value):
    path, _, _ = saved(tmp_path)
    signed(path)
    assert loaded(path).step == 3
    signed(path, **{place: value})
    with pytest.raises(TrainingError, match=rf"^{path}: cannot be read \(.+\); delete the folder to start"):
        loaded(path)


def test_a_number_that_json_does_not_know_is_refused(tmp_path):
    path, _, _ = saved(tmp_path)
    text = (path / "state.json").read_text()
    assert '"best": 0.75' in text
    (path / "state.json").write_text(text.replace('"best": 0.75', '"best": NaN'))
    with pytest.raises(TrainingError, match=f"^{path}: state.json cannot be read .*; delete the folder to start"):
        loaded(path)


@pytest.mark.parametrize(
    ("identity", "sentence"),
    [
        (
            {**IDENTITY, "seed": 1},
            "was made with seed = 0, the recipe says 1; restore the recipe, ",
        ),
        (
            {**IDENTITY, "stage": {"lr": 0.1, "losses": {"kd": {"temperature": 2}}}},
            "was made with stage.losses.kd.temperature = 4, the recipe says 2;",
        ),
        ({"seed": 0}, "the recipe says '(absent)'; restore"),
        ({**IDENTITY, "views": 8}, "was made with views = '(absent)', the recipe says 8;"),
    ],
)
def test_a_checkpoint_of_another_run(tmp_path, identity, sentence):
    path, _, _ = saved(tmp_path)
    module = model(1)
    before = sha(module, adamw(module))
    with pytest.raises(TrainingError, match=f"^{path}: .*{re.escape(sentence)}"):
        loaded(path, identity, module=module)
    assert sha(module, adamw(module)) == before  # refused before anything is changed


@pytest.mark.parametrize("version", [1, 3, None])
def test_a_checkpoint_of_another_version(tmp_path, version):
    path, _, _ = saved(tmp_path)
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**record, "version": version}))
    with pytest.raises(
        TrainingError, match=f"^{path}: has version {version}, this kd_dist reads 2; use the kd_dist that wrote it$"
    ):
        loaded(path)


# ------------------------------------------------------------------------------------------------ one is always there


def test_no_checkpoint(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None
    (tmp_path / "checkpoint-00000009.tmp").mkdir()
    (tmp_path / "best.safetensors").touch()
    assert latest(tmp_path) is None


def test_the_newest_alone_is_kept_and_remains_of_a_kill_are_removed(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / "checkpoint-00000004.tmp").mkdir()
    (tmp_path / "checkpoint-00000120.tmp").mkdir()
    (tmp_path / "checkpoint-00000120.tmp" / "rest").touch()
    assert latest(tmp_path).name == "checkpoint-00000003"
    saved(tmp_path, 120)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000120"]
    assert loaded(latest(tmp_path)).step == 120


def test_what_else_is_called_like_a_checkpoint_is_the_users(tmp_path):
    """Copies in folders of other names, and files; none is taken for a checkpoint, and none is deleted."""
    kept = ["checkpoint-00000009.backup", "checkpoint-good", "checkpoint-000000010", "checkpoint-zz.tmp"]
    for name in kept:
        (tmp_path / name).mkdir()
    for name in ("checkpoint-00000007", "checkpoint-00000008.tmp", "checkpoint-notes.txt"):
        (tmp_path / name).touch()
        kept.append(name)
    assert latest(tmp_path) is None
    saved(tmp_path, 3)
    saved(tmp_path, 5)
    assert latest(tmp_path).name == "checkpoint-00000005"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["checkpoint-00000005", *kept])


@pytest.mark.parametrize("name", ["checkpoint-00000005", "checkpoint-00000005.tmp"])
def test_a_file_in_the_way_of_a_checkpoint_is_one_sentence(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(TrainingError, match=f"^{tmp_path}/{name}: is in the way of a checkpoint; move it away and run"):
        saved(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_same_step_again_keeps_what_is_there(tmp_path):
    path, _, _ = saved(tmp_path, 3)
    before = {one.name: (one.stat().st_ino, one.read_bytes()) for one in path.iterdir()}
    saved(tmp_path, 3)
    assert {one.name: (one.stat().st_ino, one.read_bytes()) for one in path.iterdir()} == before
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint-00000003"]


def test_weights_that_nobody_should_go_on_from(tmp_path):
    module = model()
    assert checkpoint.unsound(module.state_dict()) is None
    module[3].bias.data[1] = float("inf")
    assert checkpoint.unsound(module.state_dict()) == "3.bias"


def test_a_save_that_fails_leaves_the_older_one(tmp_path):
    saved(tmp_path, 3)
    with pytest.raises(TypeError):
        saved(tmp_path, 5, identity={"not": {"JSON"}})
    assert latest(tmp_path).name == "checkpoint-00000003"
    assert loaded(latest(tmp_path)).step == 3


def test_a_file_that_cannot_be_written_to_its_end_leaves_the_older_checkpoint(tmp_path):
    """The kernel refuses to let any file of a child process grow beyond some bytes."""
    saved(tmp_path / "whole", 5)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole/checkpoint-00000005").iterdir()}
    for limit in sorted(sizes.values()):
        folder = tmp_path / str(limit)
        saved(folder, 3)
        later = trained(5)  # here: a process that has traced a graph cannot go backward once it is forked
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit - 1, limit - 1))
            try:
                put(folder, *later, progress_of(5))
            except OSError as error:
                os._exit(error.errno if error.filename == str(folder / "checkpoint-00000005") else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
        assert [path.name for path in folder.iterdir()] == ["checkpoint-00000003"]  # what filled the disk is gone
        assert loaded(latest(folder)).step == 3
        saved(folder, 6)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-00000006"]


STAGES = ["mkdir", "serialized", "fsync", "rename", "rmtree"]


@pytest.mark.parametrize("call", STAGES)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, call):
    """A process is killed just before its first, second, ... call of one kind, until it lives to the end."""
    survived = kills = 0
    while not survived:
        folder = tmp_path / str(kills)
        saved(folder, 3)
        later = trained(5)
        child = os.fork()
        if child == 0:
            owner = {"mkdir": Path, "serialized": checkpoint, "fsync": os, "rename": os, "rmtree": shutil}[call]
            stop_before(owner, call, kills)
            put(folder, *later, progress_of(5))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        survived = status == 0
        assert survived or os.WTERMSIG(status) == signal.SIGKILL
        found = loaded(latest(folder))
        assert found.step in ((5,) if survived else (3, 5))
        saved(folder, 6)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-00000006"]
        kills += not survived
    assert kills >= 1


def stop_before(owner, name: str, count: int) -> None:
    """Let this process be killed when it is about to make call number `count` of `owner.name`."""
    real, made = getattr(owner, name), []

    def call(*arguments, **options):
        if len(made) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(name)
        return real(*arguments, **options)

    setattr(owner, name, call)
