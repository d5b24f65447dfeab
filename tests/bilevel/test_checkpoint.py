import errno
import os
import pickle
import resource
import signal
import stat

import pytest
import torch
from checkpoints import pruned
from torch import nn

from blokern.bilevel import checkpoint
from blokern.bilevel.checkpoint import CheckpointError
from blokern.sparse import masks_of, sparsify

PAYLOAD = {
    "model": {"weight": torch.arange(12.0).view(3, 4), "count": torch.tensor(7)},
    "nested": {"list": [1, 2.5, float("inf"), None, "text"], "pair": (0.5, True)},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


def saved(path, payload=PAYLOAD):
    checkpoint.save(path, payload)
    return path


def test_what_is_saved_comes_back(path):
    loaded = checkpoint.load(saved(path))
    assert torch.equal(loaded["model"]["weight"], PAYLOAD["model"]["weight"])
    assert torch.equal(loaded["model"]["count"], PAYLOAD["model"]["count"])
    assert loaded["nested"] == PAYLOAD["nested"]
    assert loaded["version"] == checkpoint.VERSION


def test_plain_torch_reads_it_too(path):
    assert torch.load(saved(path), weights_only=True)["nested"] == PAYLOAD["nested"]


def test_nothing_but_the_file_is_left_in_the_folder(path):
    saved(saved(path))
    assert list(path.parent.iterdir()) == [path]


def test_equal_contents_have_equal_fingerprints(tmp_path):
    one, same = saved(tmp_path / "a.pt"), saved(tmp_path / "b.pt")
    other = saved(tmp_path / "c.pt", {**PAYLOAD, "more": 1})
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(same) != checkpoint.fingerprint(other)


# --- Bad files ----------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"last\.pt"):
        checkpoint.load(path)


def test_every_flipped_bit_is_noticed(path):
    good = saved(path).read_bytes()
    for index in range(len(good)):
        bad = bytearray(good)
        bad[index] ^= 1 << index % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"last\.pt"):
            checkpoint.load(path)


def test_every_truncation_is_noticed(path):
    good = saved(path).read_bytes()
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError, match="was cut short"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"conv.weight": torch.zeros(2)}, path),
        lambda path: torch.save(nn.Linear(2, 2), path),
        lambda path: path.write_bytes(pickle.dumps({"version": 1})),
        lambda path: path.write_text("hello\n" * 100),
    ],
    ids=["state_dict", "module", "pickle", "text"],
)
def test_a_foreign_file_is_refused(path, write):
    write(path)
    with pytest.raises(CheckpointError, match=r"last\.pt is not a checkpoint of blokern"):
        checkpoint.load(path)


def test_code_in_a_checkpoint_is_not_run(path):
    saved(path, {"model": nn.Linear(2, 2)})  # whole, but it holds a class
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be read"):
        checkpoint.load(path)


def test_another_version_is_named(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    saved(path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has checkpoint format 99, but this blokern reads format 1"):
        checkpoint.load(path)


def test_another_architecture_is_summed_up_and_leaves_the_model_alone():
    model, other = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load_weights(model, other.state_dict(), "x.pt")
    message = str(raised.value)
    assert message.startswith("x.pt is of another architecture")
    assert "2 unknown to the model (1.weight, 1.bias)" in message
    assert "2 of another shape (0.weight [5, 4] for [3, 4], 0.bias [5] for [3])" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_long_list_of_problems_is_cut():
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))
    with pytest.raises(CheckpointError, match=r"10 missing \(0\.weight, 0\.bias, 1\.weight, … 7 more\)"):
        checkpoint.load_weights(many, {}, "x.pt")


# --- Masks --------------------------------------------------------------------------------------------------


def layers(*more):
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 70), *more)


def masked():
    masks = {"0.weight": torch.rand(3, 2, 3, 3) < 0.5, "2.weight": torch.rand(70, 3) < 0.5}
    return sparsify(layers(), masks)


def test_a_pruned_networks_checkpoint_gives_a_dense_one_its_masks(path):
    pruned = masked()
    loaded = checkpoint.load(saved(path, {"model": pruned.state_dict()}))["model"]
    before, model = {name: tensor.clone() for name, tensor in loaded.items()}, layers()
    checkpoint.load_weights(model, loaded, path)
    assert masks_of(model) == masks_of(pruned)
    x = torch.rand(4, 2, 3, 3)
    assert torch.equal(model(x), pruned(x))
    # The payload stays as it is, whatever becomes of the model.
    masks_of(model)["2.weight"].update_(torch.zeros(70, 3, dtype=torch.bool))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.items())
    checkpoint.load_weights(model, loaded, path)  # into one that is pruned already
    assert masks_of(model) == masks_of(pruned)


def test_a_layer_alone_gets_its_mask():
    pruned = sparsify(nn.Linear(4, 3), {"weight": torch.rand(3, 4) < 0.5})
    model = nn.Linear(4, 3)
    checkpoint.load_weights(model, pruned.state_dict(), "x.pt")
    assert masks_of(model) == masks_of(pruned)


def test_masks_that_do_not_fit_are_refused_and_leave_the_model_alone():
    weights = masked().state_dict()
    for model, message in (
        (layers(nn.Linear(1, 1)), "2 missing"),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.ReLU()), "4 unknown to the model .*2.mask_words"),
        (
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 71)),
            "unknown to the model .2.mask_words",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_weights(model, weights, "x.pt")
        assert type(model[0]) is nn.Conv2d
    with pytest.raises(CheckpointError, match=r"2 missing \(0\.mask_words, 2\.mask_words\)"):
        checkpoint.load_weights(masked(), layers().state_dict(), "x.pt")


# --- Failures while writing ---------------------------------------------------------------------------------


def fail_with_full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_old_one_is_intact(path):
    assert checkpoint.load(path)["nested"] == PAYLOAD["nested"]
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_checkpoint(path, monkeypatch):
    saved(path)
    monkeypatch.setattr(os, "fsync", fail_with_full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*last\.pt") as raised:
        checkpoint.save(path, {"new": 1})
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert_old_one_is_intact(path)


def test_a_write_that_the_system_cuts_off_leaves_the_old_checkpoint(path):
    saved(path)
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old_limit[1]))
    try:
        with pytest.raises(OSError, match=r"last\.pt"):
            checkpoint.save(path, {"big": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert_old_one_is_intact(path)


def test_an_interrupted_write_leaves_the_old_checkpoint(path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    saved(path)
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"new": 1})
    monkeypatch.undo()
    assert_old_one_is_intact(path)


def test_a_temporary_file_of_a_killed_process_does_no_harm(path):
    (path.parent / ".last.pt.tmp").write_bytes(b"half")
    assert_old_one_is_intact(saved(path))


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(NotADirectoryError, match=r"runs/last\.pt"):
        checkpoint.save(tmp_path / "runs" / "last.pt", PAYLOAD)


def test_file_and_folder_are_synced_around_the_rename(path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"sync {kind}")
        real_fsync(descriptor)

    def replace(source, target):
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    saved(path)
    assert events == ["sync file", "rename", "sync folder"]


def test_nothing_but_a_checkpoint_is_written_over_one(tmp_path):
    from blokern import plots
    from blokern.bilevel.export import save_dense

    path = tmp_path / "best.pt"
    checkpoint.save(path, pruned(None))
    before = path.read_bytes()
    for write in (
        lambda: checkpoint.write_atomically(path, b"a"),
        lambda: save_dense(checkpoint.load(path), path, path),
        lambda: plots.layers({0.1: {"omp": {"stem.weight": 0.9}}}, path),
    ):
        with pytest.raises(ValueError, match=r"best\.pt is a checkpoint, which nothing else is written over"):
            write()
    assert path.read_bytes() == before
    checkpoint.save(path, {"model": {}})


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(dtype):
    model = torch.nn.Linear(2, 2)
    weights = {**model.state_dict(), "weight": torch.ones(2, 2).to(dtype)}
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"1 of another kind of number \(weight {dtype} for"
    ):
        checkpoint.load_weights(model, weights, "a.pt")
    checkpoint.load_weights(model, {**model.state_dict(), "weight": torch.ones(2, 2).half()}, "a.pt")
