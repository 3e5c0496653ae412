"""What folders, machines and terminals are like in the wild: left-over files, other archives, no
git, output that nobody reads.
"""

import errno
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, load, run, same, start
from PIL import Image

import generate
import train_classifier
from data import checkpoints, imagenet, mnist, runs

WNIDS = imagenet.imagenet_metadata()["wnids"]
LEFT_OVER = ["._a.JPEG", "._0.png", ".DS_Store", ".ipynb_checkpoints/a.png", "__MACOSX/a.png"]


def save(path, size=(40, 30), color=(200, 99, 0)):
    """An image of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def leave_over(root):
    """Put what other programs leave into every folder."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in LEFT_OVER:
            save(folder / "x.png").rename(folder / "x")
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / "x").rename(folder / name)
        (folder / "Thumbs.db").touch()


# --------------------------------------------------------------------------------------------------
# Folders


def by_wnid(root):
    save(root / WNIDS[0] / "a.JPEG")
    return imagenet.wnid_images


def cue_conflict(root):
    save(root / "cat" / "cat1-dog2.png")
    return imagenet.cue_conflict_images


def imagenet9(root):
    save(root / "original" / "val" / "00_dog" / "a.JPEG")
    return imagenet.imagenet9_images


def photographs(root):
    save(root / "a.png")
    return lambda folder: imagenet.photograph_images(folder, [3])


def counterfactuals(root):
    save(root / "counterfactual" / "0000000.jpg")
    (root / "labels.csv").write_text(
        "file,shape,texture,background\ncounterfactual/0000000.jpg,1,2,3\n"
    )
    return lambda folder: imagenet.counterfactual_images([folder])


def textures(root):
    for kind in ("object", "background"):
        for index in range(10):
            save(root / kind / f"{index}.png")
    return lambda folder: mnist.load_textures(folder, None)


@pytest.mark.parametrize(
    "kind", [by_wnid, cue_conflict, imagenet9, photographs, counterfactuals, textures]
)
def test_what_other_programs_leave_is_no_data(kind, tmp_path):
    find = kind(tmp_path / "data")
    before = find(tmp_path / "data")
    leave_over(tmp_path / "data")
    after = find(tmp_path / "data")
    assert same(before, after)


def test_imagenet_as_kaggle_unpacks_it(tmp_path, capsys):
    top = tmp_path / "archive"
    folder = top / "ILSVRC" / "Data" / "CLS-LOC"
    save(folder / "train" / WNIDS[7] / "a.JPEG")
    rows = ["ImageId,PredictionString"]
    for index, label in enumerate((7, 900, 7)):
        save(folder / "val" / f"ILSVRC2012_val_{index:08d}.JPEG")
        rows.append(f"ILSVRC2012_val_{index:08d},{WNIDS[label]} 1 2 3 4 {WNIDS[0]} 5 6 7 8 ")
    table = top / "LOC_val_solution.csv"
    table.write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")  # in no order
    for given in (top, folder):
        root = imagenet.imagenet_root(given)
        assert root == folder
        assert imagenet.validation_images(root)[1].tolist() == [7, 900, 7]
        assert f"their classes from {table}" in capsys.readouterr().out
    table.write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(runs.UserError, match="does not tell the classes"):
        imagenet.validation_images(folder)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(runs.UserError, match="not Kaggle's table"):
        imagenet.validation_images(folder)
    table.unlink()
    with pytest.raises(runs.UserError, match="LOC_val_solution.csv.*meta.bin"):
        imagenet.validation_images(folder)


def test_numbers_name_classes_only_if_all_are_there(tmp_path):
    """The development kit numbers classes from 1, in another order."""
    for name in range(1, 1001):
        (tmp_path / str(name)).mkdir()
        (tmp_path / str(name) / "a.png").touch()
    with pytest.raises(runs.UserError, match="only if there are all of 0 to 999.*by WNID"):
        imagenet.wnid_images(tmp_path)
    (tmp_path / "1000").rename(tmp_path / "0")
    paths, labels = imagenet.wnid_images(tmp_path)
    assert [path.parent.name for path in paths] == [str(label) for label in labels.tolist()]
    shutil.rmtree(tmp_path / "5")
    with pytest.raises(runs.UserError, match="only if there are all of 0 to 999"):
        imagenet.wnid_images(tmp_path)


def test_imagenet9_skips_folders_without_images(tmp_path):
    save(tmp_path / "original" / "val" / "00_dog" / "a.JPEG")
    masks = tmp_path / "fg_mask" / "val" / "00_dog"
    masks.mkdir(parents=True)
    (masks / "a.npy").touch()
    assert imagenet.imagenet9_images(tmp_path).keys() == {"original"}


def test_imagenet_c_has_a_row_for_each_corruption_and_its_mean_error(tmp_path):
    for corruption in ("fog", "snow"):
        for severity in range(1, 6):
            for wnid in WNIDS[:2]:
                save(tmp_path / "c" / corruption / str(severity) / wnid / "a.JPEG", (224, 224))
    found = imagenet.corruption_folders(tmp_path / "c")
    assert list(found) == [(name, str(n)) for name in ("fog", "snow") for n in range(1, 6)]
    assert imagenet.corruption_folders(tmp_path / "c" / "fog" / "1") == {}
    assert imagenet.corruption_folders(tmp_path).keys() == found.keys()  # a folder for each kind

    flags = "--dataset imagenet --offline --arch resnet18 --batch-size 4 --workers 0 --device cpu"
    flags = [*flags.split(), "--evaluate", "--image-size", 64, "--ood", f"C={tmp_path / 'c'}"]
    run("train_classifier.py", *flags, "--baseline", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.count("| baseline | top-1 |") == 10 and "| C/snow/5 | baseline | top-1 |" in text
    assert "| C | baseline | mean top-1 |" in text and "corruption error" not in text


def test_mean_corruption_error_by_hand():
    tests = {f"C/{name}/{n}": ("corruption", None) for name in ("fog", "snow") for n in (1, 2)}
    shares = {"mean": (90, 70, 100, 80), "baseline": (80, 60, 50, 50)}
    rows = []
    for head, values in shares.items():
        for test, value in zip(tests, values):
            rows.append((test, head, "top-1", float(value), 1, 1))
            rows.append((test, head, "top-5", 100.0, 1, 1))
    rows.append(("in9", "mean", "background gap", 1.0, None, None))
    added = {row[1:3]: row[3] for row in train_classifier.corruption_rows(rows, tests)}
    assert added == {
        ("mean", "mean top-1"): pytest.approx(85),
        ("baseline", "mean top-1"): pytest.approx(60),
        # (10 + 30) / (20 + 40) for fog, (0 + 20) / (50 + 50) for snow.
        ("mean", "mean corruption error"): pytest.approx(100 * (40 / 60 + 20 / 100) / 2),
    }


@pytest.mark.parametrize("size, whole", [((224, 224), True), ((500, 375), False)])
def test_images_that_come_cropped_are_seen_whole(size, whole, tmp_path, monkeypatch):
    """The outer columns of ImageNet-C's images count, too."""
    margins = []
    make = imagenet.make_transform

    def note(training, size, margin):
        margins.append(margin)
        return make(training, size, margin)

    monkeypatch.setattr(imagenet, "make_transform", note)
    images = imagenet.labeled_images([save(tmp_path / "a" / "a.png", size).parent], [0])
    args = train_classifier.parse_args(
        "--dataset imagenet --out x --data-dir x --batch-size 2 --workers 0 --offline".split()
    )
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.append(torch.nn.Linear(3, 1000))
    device = torch.device("cpu")
    train_classifier.count_hits(model, 1, "ood", images, train_classifier.top_hits, args, device)
    assert margins == [not whole]


def test_a_damaged_training_image_is_replaced(tmp_path, capsys):
    """Batches stay whole, so that several ranks make the same number of steps."""
    paths = [save(tmp_path / f"{index}.png", color=(index, 0, 0)) for index in range(6)]
    paths[2].write_text("no image")
    paths[3].unlink()
    images = imagenet.Images(paths, torch.arange(6), lambda image: image, replace=True)
    found = list(imagenet.batches(images, [2, 0, 3, 5], 2, 0, torch.device("cpu")))
    assert [labels.tolist() for _, labels in found] == [[4, 0], [4, 5]]
    assert [pixels[:, 0, 0, 0].tolist() for pixels, _ in found] == [[4, 0], [4, 5]]
    shown = capsys.readouterr().err
    assert shown.count("2.png: damaged") == 1 and shown.count("3.png: damaged") == 1


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_file_names_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"h\xf6hle.png")  # Latin-1
    save(tmp_path / "class" / name)
    paths, labels = imagenet.labeled_images([tmp_path / "class"], [0])
    assert imagenet.Images(paths, labels, lambda image: image)[0][0].shape == (3, 30, 40)
    runs.write_csv(tmp_path / "table.csv", [["file"], [name]])
    runs.append_text(tmp_path / "table.csv", name)
    assert (tmp_path / "table.csv").read_bytes().count(b"h\xf6hle.png") == 2


# --------------------------------------------------------------------------------------------------
# Runs that go on


def test_textures_may_have_moved(tmp_path):
    before = {"textures": "/old/place", "lr": 0.1}
    checkpoints.check_settings("x", before, {"textures": "/new/place", "lr": 0.1, "new_flag": 1})
    for other in (None, "dtd"):
        with pytest.raises(runs.UserError, match="made with textures"):
            checkpoints.check_settings("x", before, {"textures": other, "lr": 0.1})


def test_a_run_older_than_a_flag_goes_on_as_it_began():
    checkpoints.check_settings("x", {"lr": 0.1}, {"lr": 0.1, "texture_padding": "zeros"})
    with pytest.raises(runs.UserError, match="made with texture_padding = zeros, not circular"):
        checkpoints.check_settings("x", {"lr": 0.1}, {"lr": 0.1, "texture_padding": "circular"})


def test_an_older_run_without_the_losses_of_the_warm_up_goes_on():
    """It had none, though its arguments say so."""
    before = {"warmup": 1000, "border_weight": 0.0, "frame_weight": 10.0}
    checkpoints.check_settings("x", before, before | {"warmup": 0})
    with pytest.raises(runs.UserError, match="made with warmup = 1000, not 0"):
        checkpoints.check_settings("x", before | {"border_weight": 5.0}, {"warmup": 0})


def test_what_changes_the_numbers_stays_when_a_run_is_resumed():
    names = "seed batch_size accumulate lr amp style_weights discriminator train augment arch"
    for name in names.split():
        with pytest.raises(runs.UserError, match=f"made with {name} = 1, not 2"):
            checkpoints.check_settings("x", {name: 1}, {name: 2})


def test_a_digit_set_is_made_longer(untrained, tmp_path):
    flags = ["--weights", untrained, "--device", "cpu", "--out"]
    run("generate.py", *flags, tmp_path / "grown", "--n", 30)
    path = tmp_path / "grown" / "chunk_00000.pt"
    older = load(path)
    for name in generate.Settings._field_defaults:  # as chunks were before these
        del older["settings"][name]
    torch.save(older, path)
    run("generate.py", *flags, tmp_path / "grown", "--n", 50, "--resume")
    run("generate.py", *flags, tmp_path / "whole", "--n", 50)
    assert same(load(path), load(tmp_path / "whole" / "chunk_00000.pt"))
    done = run("generate.py", *flags, tmp_path / "grown", "--n", 20, "--resume", expect=2)
    assert "goes on to image 50" in done.stderr
    assert (tmp_path / "grown" / "dataset.json").is_file()


# --------------------------------------------------------------------------------------------------
# Machines


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runs.git_revision() is None


def test_a_copy_in_another_repository_has_not_its_revision(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert len(runs.git_revision()) == 40
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(runs, "ROOT", tmp_path / "copy")
    assert runs.git_revision() is None


def test_odd_surroundings_and_names(digits_dir, tiny, tmp_path, monkeypatch):
    """Another working folder, no home, no user; symbolic links; names that look like patterns,
    flags or words of a shell.
    """
    root = tmp_path / "a [b]* 'c' \"d\" $HOME ü #1" / ("x" * 250)
    root.mkdir(parents=True)
    (root / "digits").symlink_to(digits_dir, target_is_directory=True)
    monkeypatch.chdir(root)
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    flags = [root / "digits" if word == str(digits_dir) else word for word in tiny]
    done = run("train_cgn.py", "--dataset", "colored_mnist", *flags, "--out", root / "--cgn")
    hint = shlex.split(done.stdout.rpartition("next: python ")[2])
    assert hint == ["generate.py", "--weights", str(root / "--cgn" / "weights.pt")]
    done = run(*hint, "--n", 20, "--out", root / "cf [0]", "--device", "cpu")
    hint = shlex.split(done.stdout.rpartition("next: python ")[2])
    hint[-1] = root / "out"
    flags = ["--data-dir", root / "digits", "--epochs", 1, "--max-steps", 1, "--device", "cpu"]
    run(*hint, *flags)
    assert (root / "out" / "results.json").is_file()


def test_a_run_writes_beside_nothing_but_its_folder(digits_dir, tiny, tmp_path):
    """So data on a read-only disk will do."""

    def state():
        return {path: path.stat().st_mtime_ns for path in [digits_dir, *digits_dir.rglob("*")]}

    before = state()
    run("train_cgn.py", "--dataset", "colored_mnist", *tiny, "--out", tmp_path / "out")
    assert state() == before


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with runs.lock_file(tmp_path / ".lock"):
        assert runs.lock_file(tmp_path / ".lock")  # nothing keeps a second process out there


def test_rates_do_not_follow_a_clock_that_is_set(tmp_path, monkeypatch, capsys):
    """Nor does a resumed run count the steps of the one before."""
    moment = [100.0]
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    log = runs.Log(tmp_path / "log.jsonl", step=500)
    moment[0] += 10
    log.progress(520, 1000, {})
    assert "520/1000  2.0 steps/s  4:00 left" in capsys.readouterr().out


def test_without_assertions(untrained, tmp_path):
    """python -O leaves them out: nothing may depend on them."""
    flags = ["--weights", untrained, "--n", 10, "--device", "cpu", "--out", tmp_path / "out"]
    command = [sys.executable, "-O", ROOT / "generate.py", *flags]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert len(load(tmp_path / "out" / "chunk_00000.pt")["images"]) == 10


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    counterfactuals(tmp_path / "cf [0]*")
    for name in ("cf [0]*", "cf*"):
        assert len(imagenet.counterfactual_images([tmp_path / name])[0]) == 1


def test_compiling_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(runs.UserError, match="--compile: needs a C.. compiler"):
        runs.check_compiler()


def test_a_folder_named_tensorboard_is_no_tensorboard(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch.utils")
    (tmp_path / "tensorboard").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    runs.Log(tmp_path / "log.jsonl").write(1, loss=2.0)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    assert "no TensorBoard" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        runs.run_main(lambda: (tmp_path / "none" / "a").read_text())
    assert capsys.readouterr().err == f"error: {tmp_path}/none/a: No such file or directory\n"


def test_a_run_that_was_cut_before_its_description_begins_again(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with runs.claim_folder(tmp_path, "train_cgn.py", None):
        pass
    (tmp_path / "other").write_text("")
    with pytest.raises(runs.UserError, match="holds other files"):
        runs.check_folder(tmp_path, "train_cgn.py", "auto")


def test_a_log_that_cannot_grow_is_one_line(tmp_path):
    log = runs.Log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(runs.UserError, match="cannot write .*log.jsonl"):
        log.write(1, loss=2.0)


# --------------------------------------------------------------------------------------------------
# Output


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written_ends_no_run(tiny, tmp_path):
    flags = ["--dataset", "colored_mnist", *tiny, "--log-every", 1, "--out"]
    process = start("train_cgn.py", *flags, tmp_path / "full", output=("/dev/full", "/dev/full"))
    process.join(300)
    assert process.exitcode == 0
    assert load(tmp_path / "full" / "checkpoint.pt")["step"] == 6


def test_a_pipe_whose_reader_has_ended_ends_no_run(tiny, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    flags = ["--dataset", "colored_mnist", *tiny, "--log-every", 1, "--out", tmp_path / "out"]
    process = start("train_cgn.py", *flags, output=(tmp_path / "pipe", tmp_path / "stderr"))
    while process.is_alive() and not (tmp_path / "out").exists():
        time.sleep(0.01)
    os.close(reader)
    process.join(300)
    assert (process.exitcode, (tmp_path / "stderr").read_text()) == (0, "")
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 6


def test_output_that_was_closed_is_dropped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    runs.protect_output()
    print("x", flush=True)
    assert not sys.stdout.isatty()


def test_letters_that_an_encoding_lacks():
    buffer = io.BytesIO()
    output = runs.Output(io.TextIOWrapper(buffer, encoding="ascii"))
    print("Höhle \udcf6", file=output, flush=True)
    assert buffer.getvalue() == b"H\\xf6hle \\udcf6\n"


def test_a_closed_terminal_stops_a_run_but_for_nohup():
    before = signal.getsignal(signal.SIGHUP)
    numbers = (signal.SIGTERM, signal.SIGINT)
    others = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert not runs.StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = runs.StopSignal()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop and stop.stopped().number == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
        for number, handler in zip(numbers, others):
            signal.signal(number, handler)
