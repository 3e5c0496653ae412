"""Nothing lost, nothing trusted: kills, full disks, bad numbers, damaged and hostile files, memory.

The long forms run with `python -m pytest -m soak tests`.
"""

import hashlib
import json
import math
import os
import pickle
import platform
import random
import resource
import signal
import subprocess
import sys
import time
import types
import zipfile

import pytest
import torch
from PIL import Image

import train_cgn
from conftest import ROOT, SMALL_IMAGENET, SOAK, check_kills, contents, load, run, same, start
from data.checkpoints import Training, find_checkpoint, finite_step, mend_statistics
from data.imagenet import Images, counterfactual_images, make_transform, start_worker
from data.mnist import load_textures
from data.runs import Log, UserError, claim_folder, file_sha256

KILLS = [3, pytest.param(20, marks=SOAK)]


# --------------------------------------------------------------------------------------------------
# Killed at any moment


@pytest.mark.parametrize("kills", KILLS)
def test_killed_trainings_end_the_same(tiny, tmp_path, kills):
    """Of the generator and of its segmenter."""
    flags = ["--dataset", "colored_mnist", *tiny, "--max-steps", 6 * kills, "--seed", 5]
    flags += ["--segmenter-steps", kills]
    flags += ["--log-every", 1, "--save-every", 2, "--sample-every", 20]
    check_kills("train_cgn.py", flags, tmp_path, kills)


@pytest.mark.parametrize("kills", KILLS)
def test_killed_generations_end_the_same(untrained, tmp_path, kills):
    flags = ["--weights", untrained, "--n", 1_000 * kills, "--device", "cpu"]
    check_kills("generate.py", flags, tmp_path, kills)


@pytest.mark.parametrize("kills", KILLS)
def test_killed_classifiers_end_the_same(digits_dir, tmp_path, kills):
    flags = ["--dataset", "double_colored_mnist", "--data-dir", digits_dir, "--device", "cpu"]
    flags += ["--seeds", 3, 4, "--augment", 1, "--epochs", kills + 1]
    flags += ["--batch-size", 8, "--epoch-steps", 9]
    flags += ["--log-every", 7, "--save-every", 5]  # within the epochs, too
    check_kills("train_classifier.py", flags, tmp_path, kills)


@SOAK
def test_killed_imagenet_trainings_end_the_same(tmp_path):
    flags = [*SMALL_IMAGENET, "--accumulate", 2, "--max-steps", 60]
    flags += ["--log-every", 1, "--save-every", 2, "--sample-every", 20]
    check_kills("train_cgn.py", flags, tmp_path, 20)


@SOAK
def test_killed_imagenet_generations_end_the_same(small_cgn, tmp_path):
    flags = ["--dataset", "imagenet", "--weights", small_cgn / "weights.pt", "--device", "cpu"]
    flags += ["--n", 400, "--batch-size", 4]
    check_kills("generate.py", flags, tmp_path, 20)


def test_the_sheet_is_not_older_than_the_checkpoint(tmp_path, monkeypatch):
    """A run that is killed after its last checkpoint draws no other sheet."""
    settings = dict(resume=None, log_every=1, save_every=1, sample_every=0, bad_steps=1)
    args = types.SimpleNamespace(**settings)
    network = torch.nn.Linear(1, 1)
    sheets = []
    replace = os.replace

    def look(source, target):
        if target.name == "checkpoint.pt":
            sheets.append((tmp_path / "sheet.png").read_bytes())
        replace(source, target)

    def draw_sheet(networks, args):
        return torch.full((3, 8, 8), int(networks["generator"].weight), dtype=torch.uint8)

    monkeypatch.setattr(os, "replace", look)
    training = Training(
        tmp_path, args, {"generator": network}, [], 2, torch.device("cpu"), draw_sheet=draw_sheet
    )
    for step in range(2):
        torch.nn.init.constant_(network.weight, 50 * step)
        training.end_step({}, torch.zeros(()))
        assert len(sheets) == step + 1
        assert sheets[-1] == (tmp_path / "sheet.png").read_bytes()
    assert sheets[0] != sheets[1]


@pytest.mark.parametrize("script", ["generate.py", "train_classifier.py"])
def test_sigterm_finishes_the_step_and_saves(untrained, digits_dir, tmp_path, script):
    flags = ["--weights", untrained, "--n", 4_001, "--device", "cpu"]  # three chunks
    begun = "chunk_00000.pt"
    if script == "train_classifier.py":
        flags = ["--dataset", "wildlife_mnist", "--data-dir", digits_dir, "--device", "cpu"]
        flags += ["--epochs", 8, "--save-every", 6, "--batch-size", 8, "--epoch-steps", 9]
        begun = "seed_0/checkpoint.pt"
    run(script, *flags, "--out", tmp_path / "whole")
    output = tmp_path / "stdout", tmp_path / "stderr"
    process = start(script, *flags, "--out", tmp_path / "cut", output=output)
    while not (tmp_path / "cut" / begun).exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.terminate()
    process.join()
    message = "resume with the same command and --resume"
    assert process.exitcode == 128 + signal.SIGTERM and message in output[0].read_text()
    assert contents(tmp_path / "cut").keys() < contents(tmp_path / "whole").keys()
    run(script, *flags, "--resume", "--out", tmp_path / "cut")
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "cut"))


def test_workers_leave_it_to_the_main_process_to_stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        start_worker(0)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny, tmp_path):
    flags = ["--dataset", "colored_mnist", *tiny, "--log-every", 1]
    run("train_cgn.py", *flags, "--out", tmp_path / "run")  # saves at 3 and 6
    whole = contents(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint.pt"
    before = tmp_path / "run" / "checkpoint_before.pt"
    assert load(before)["step"] == 3
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1  # one bit of one weight
    newest.write_bytes(raw)
    done = run("train_cgn.py", *flags, "--resume", "--out", tmp_path / "run")
    message = "checkpoint.pt: its checksums are wrong; falling back to the previous one"
    assert message in done.stderr
    assert same(whole, contents(tmp_path / "run"))
    for path in (newest, before):
        path.write_bytes(path.read_bytes()[:-100])
    done = run("train_cgn.py", *flags, "--resume", "--out", tmp_path / "run", expect=2)
    assert "no checkpoint in" in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_chunk_is_made_again(untrained, tmp_path):
    flags = ["--weights", untrained, "--n", 2_010, "--device", "cpu", "--out", tmp_path / "set"]
    run("generate.py", *flags)
    whole = contents(tmp_path / "set")
    path = tmp_path / "set" / "chunk_00001.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)
    assert "chunk_00001.pt is damaged; made again" in run("generate.py", *flags, "--resume").stderr
    assert same(whole, contents(tmp_path / "set"))


def test_a_second_process_in_the_folder_is_refused(tiny, tmp_path):
    flags = ["train_cgn.py", "--dataset", "colored_mnist", *tiny, "--out", tmp_path / "run"]
    run(*flags, "--max-steps", 1)
    with claim_folder(tmp_path / "run", "train_cgn.py", True):
        done = run(*flags, "--resume", expect=2)
        assert "another process is at work in this folder" in done.stderr
    run(*flags, "--resume")


# --------------------------------------------------------------------------------------------------
# A full disk, stood in for by a limit on the size of a file


@pytest.mark.parametrize("limit", [10_000, 3_000_000])  # in weights.pt; later
def test_full_disk_while_training(tiny, tmp_path, limit):
    flags = ["--dataset", "colored_mnist", *tiny, "--log-every", 1]
    run("train_cgn.py", *flags, "--out", tmp_path / "whole")
    run("train_cgn.py", *flags, "--max-steps", 3, "--out", tmp_path / "full")
    before = contents(tmp_path / "full")
    done = run(
        "train_cgn.py",
        *flags,
        "--resume",
        "--out",
        tmp_path / "full",
        expect=2,
        bytes_per_file=limit,
    )
    assert done.stderr.startswith("error: cannot write ") and "free some space" in done.stderr
    assert same(before["checkpoint.pt"], contents(tmp_path / "full")["checkpoint.pt"])
    run("train_cgn.py", *flags, "--resume", "--out", tmp_path / "full")
    assert same(contents(tmp_path / "whole"), contents(tmp_path / "full"))


def check_full_disk(script, flags, out, limit):
    done = run(script, *flags, "--out", out, expect=2, bytes_per_file=limit)
    assert "error: cannot write " in done.stderr and "Traceback" not in done.stderr
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.pt"))
    run(script, *flags, "--resume", "--out", out)


def test_full_disk_while_generating(untrained, tmp_path):
    flags = ["--weights", untrained, "--n", 2_200, "--device", "cpu"]
    check_full_disk("generate.py", flags, tmp_path / "set", 1_000_000)


def test_full_disk_while_classifying(digits_dir, tmp_path):
    flags = ["--dataset", "colored_mnist", "--data-dir", digits_dir, "--device", "cpu"]
    check_full_disk("train_classifier.py", [*flags, "--epochs", 1], tmp_path / "run", 50_000)


# --------------------------------------------------------------------------------------------------
# Numbers gone wrong


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, 0.1, fused=True),
        lambda p: torch.optim.Adadelta(p),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(make, first):
    weight, twin = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, other = make([weight]), make([twin])

    def step(optimizer, weight, gradient, loss=1.0):
        weight.grad = torch.tensor(gradient)
        return finite_step(optimizer, torch.tensor(loss)).item()

    bad = (
        ([1.0, float("nan"), 1.0], 1.0),
        ([1.0, float("inf"), 1.0], 1.0),
        ([1.0] * 3, float("inf")),
    )
    good = [[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]]
    for gradient in good[first:] if not first else []:
        assert step(optimizer, weight, gradient) == step(other, twin, gradient) == 0
    assert [step(optimizer, weight, *values) for values in bad] == [1, 1, 1]
    for gradient in good:
        assert step(optimizer, weight, gradient) == step(other, twin, gradient) == 0
    assert torch.equal(weight, twin) and same(
        optimizer.state_dict()["state"], other.state_dict()["state"]
    )


def test_statistics_that_became_nan_start_anew():
    bad, good = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    bad(torch.full((2, 2, 3, 3), float("nan")))
    good(torch.randn(2, 2, 3, 3))
    kept = good.running_mean.clone(), good.running_var.clone()
    mend_statistics(bad, good)
    assert bad.running_mean.eq(0).all() and bad.running_var.eq(1).all()
    assert torch.equal(good.running_mean, kept[0]) and torch.equal(good.running_var, kept[1])


def train_in_process(monkeypatch, *flags):
    """A training in this process, where its functions can be replaced."""
    command = ["train_cgn.py", "--dataset", "colored_mnist", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", command)
    train_cgn.main()


def poison(monkeypatch, bad):
    """Make the losses of these steps, counted from 1, not finite."""
    losses = train_cgn.generator_losses
    steps = iter(range(1, 100))

    def poisoned(*args):
        found, composite, mask = losses(*args)
        factor = float("nan") if next(steps) in bad else 1.0
        return {name: factor * value for name, value in found.items()}, factor * composite, mask

    monkeypatch.setattr(train_cgn, "generator_losses", poisoned)


@pytest.mark.parametrize("every", [1, 6])
def test_training_skips_a_bad_step(tiny, tmp_path, monkeypatch, capsys, every):
    """Told with the next line of the log, whenever that is. Two that are apart end no run."""
    poison(monkeypatch, [3, 5])
    flags = [*tiny, "--bad-steps", 2, "--log-every", every, "--save-every", every]
    train_in_process(monkeypatch, *flags, "--out", tmp_path / "run")
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert [line["step"] for line in lines if "left_out" in line] == [3, 5]
    assert len(lines) == 6 // every + 2 and lines[-1]["step"] == 6
    assert all(math.isfinite(x) for line in lines if "left_out" not in line for x in line.values())
    assert "step 3 skipped" in capsys.readouterr().err
    check_finite(load(tmp_path / "run" / "checkpoint.pt"), 6)


def test_a_line_of_the_log_has_the_mean_of_all_good_steps(tmp_path):
    settings = dict(resume=None, log_every=3, save_every=9, sample_every=0, bad_steps=9)
    args = types.SimpleNamespace(**settings)
    training = Training(tmp_path, args, {}, [], 9, torch.device("cpu"))
    for loss, skipped in ((1, 0), (math.nan, 1), (5, 0), (2, 0), (4, 0), (6, 0)):
        training.end_step({"l1": torch.tensor(float(loss))}, torch.tensor(float(skipped)))
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [line["l1"] for line in lines if "left_out" not in line] == [3, 4]


def test_training_gives_up_after_many_bad_steps(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, [3, 4, 5])
    flags = [*tiny, "--bad-steps", 3, "--log-every", 1, "--save-every", 1]
    words = "3 steps in a row up to 5 .*nan.*last checkpoint, which is kept"
    with pytest.raises(UserError, match=words):
        train_in_process(monkeypatch, *flags, "--out", tmp_path / "run")
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert [line["step"] for line in lines if "left_out" in line] == [3, 4, 5]
    check_finite(load(tmp_path / "run" / "checkpoint.pt"), 4)


def check_finite(checkpoint, step):
    assert checkpoint["step"] == step
    for part in ("generator", "average", "discriminator"):
        assert all(value.isfinite().all() for value in checkpoint[part].values())


def test_the_loop_reads_no_tensor_between_two_lines_of_the_log(tiny, tmp_path, monkeypatch):
    """On a GPU each reading would wait for all that was launched before."""
    counts = []
    for steps in (8, 16):
        count = 0

        def counted(original):
            def read(*args):
                nonlocal count
                count += 1
                return original(*args)

            return read

        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
            flags = [*tiny, "--max-steps", steps, "--log-every", 100, "--save-every", 100]
            train_in_process(patch, *flags, "--out", tmp_path / str(steps))
        counts.append(count)
    assert counts[0] == counts[1] > 0


def test_rates_that_are_far_too_large_end_in_one_line(tiny, digits_dir, tmp_path):
    flags = ["--dataset", "colored_mnist", *tiny, "--max-steps", 60, "--out", tmp_path / "a"]
    done = run("train_cgn.py", *flags, "--lr", 1e30, "--norm-lr", 1e30, expect=2)
    assert "20 steps in a row" in done.stderr and "Traceback" not in done.stderr
    flags = ["--dataset", "colored_mnist", "--data-dir", digits_dir, "--device", "cpu"]
    flags += ["--epochs", 4, "--amp", "off", "--out", tmp_path / "b"]
    done = run("train_classifier.py", *flags, "--lr", 1e38, expect=2)
    assert "20 steps in a row" in done.stderr and "Traceback" not in done.stderr


def test_a_collapsed_mask_is_told_once_per_interval(tiny, tmp_path, monkeypatch, capsys):
    losses = train_cgn.generator_losses

    def collapsed(*args):
        found, composite, _ = losses(*args)
        return found, composite, torch.tensor(0.99)

    monkeypatch.setattr(train_cgn, "generator_losses", collapsed)
    train_in_process(monkeypatch, *tiny, "--out", tmp_path / "a")
    warning = "mean mask is 0.990: it has collapsed"
    assert capsys.readouterr().err.count(warning) == 3  # 6 steps, --log-every 2


# --------------------------------------------------------------------------------------------------
# Files from strangers


def outcome(read, *args):
    """What reading gives, or None for a UserError of one line. Anything else fails the test."""
    try:
        return read(*args)
    except UserError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize("count", [50, pytest.param(2_000, marks=SOAK)])
def test_truncated_and_flipped_weights(untrained, tmp_path, count):
    raw, random_place = untrained.read_bytes(), random.Random(0)
    read = 0
    for number in range(count):
        place = random_place.randrange(len(raw))
        for kind in ("cut", "flip"):
            changed = (
                raw[:place]
                if kind == "cut"
                else raw[:place] + bytes([raw[place] ^ 1 << number % 8]) + raw[place + 1 :]
            )
            (tmp_path / "checkpoint.pt").write_bytes(changed)
            loaded = outcome(train_cgn.load_generator, tmp_path / "checkpoint.pt")
            assert kind == "flip" or loaded is None
            read += loaded is not None
            found = outcome(find_checkpoint, tmp_path)  # checksums are compared
            assert found is None or same(found[1], load(untrained))
    assert read > count // 4  # weights.pt of strangers: most flips change a weight a little


def test_the_hash_of_a_file_is_that_of_all_its_bytes(tmp_path):
    content = os.urandom(2**21 + 5)
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_files_that_would_run_code_or_fill_the_memory(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"generator": Attack(), "average": Attack()}, tmp_path / "code.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack()))
    with zipfile.ZipFile(
        tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED
    ) as archive:  # 600 MB in 600 kB
        with archive.open("archive/data.pkl", "w", force_zip64=True) as part:
            for _ in range(600):
                part.write(bytes(1_000_000))
    torch.save(
        {"average": torch.zeros(1).expand(10**15)}, tmp_path / "expanded.pt"
    )  # 4 bytes for 4 PB
    # The old format, which promises a storage of 4 PB and ends.
    torch.save({"x": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "old.pt").read_bytes()
    assert raw.count(b"K\x03") >= 1
    (tmp_path / "old.pt").write_bytes(
        raw.replace(b"cpuq\x07K\x03", b"cpuq\x07\x8a\x07" + (10**15).to_bytes(7, "little"))
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("code.pt", "plain.pt", "bomb.pt", "expanded.pt", "old.pt"):
        assert outcome(train_cgn.load_generator, tmp_path / name) is None, name
    assert not (tmp_path / "ran").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


ODD_IMAGES = {
    "half.jpg": None,
    "empty.jpg": None,
    "text.jpg": None,
    "folder.jpg": None,
    "link.jpg": None,
    "bomb.png": None,
    "bomb.jpg": None,
    "animation.webp": True,
    "bmp.jpg": True,
    "png.jpg": True,
    "cmyk.jpg": True,
    "sixteen.png": True,
    "palette.png": True,
    "animation.gif": True,
    "one.jpg": True,
    "alpha.png": True,
    "grey.jpg": True,
}


def write_odd_images(folder):
    noise = Image.effect_noise((60, 40), 80).convert("RGB")
    noise.save(folder / "png.png")
    noise.save(folder / "whole.jpg")
    (folder / "png.png").rename(folder / "png.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:700])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("hello\n")
    (folder / "folder.jpg").mkdir()
    (folder / "link.jpg").symlink_to(folder / "nowhere")
    for name, mode in (("bomb.png", "1"), ("bomb.jpg", "L")):
        Image.new(mode, (20_000, 20_000)).save(folder / name)
    for name in ("animation.gif", "animation.webp"):
        noise.save(folder / name, save_all=True, append_images=[noise.rotate(90)] * 2)
    noise.save(folder / "bmp.jpg", "BMP")
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    Image.new("I;16", (40, 30), 0x8080).save(folder / "sixteen.png")
    noise.convert("P").save(folder / "palette.png")
    Image.new("RGB", (1, 1)).save(folder / "one.jpg")
    noise.convert("RGBA").save(folder / "alpha.png")
    noise.convert("L").save(folder / "grey.jpg")


def test_odd_images(tmp_path):
    """As classes of ImageNet: decoded, or left out as damaged. As textures: read, or one line."""
    write_odd_images(tmp_path)
    for name, good in ODD_IMAGES.items():
        image = Images([tmp_path / name], torch.zeros(1), make_transform(True, 32))[0][0]
        assert (image is not None) == bool(good), name
        assert image is None or (image.shape, image.dtype) == ((3, 32, 32), torch.uint8), name
        for kind in ("object", "background"):
            folder = tmp_path / f"textures of {name}" / kind
            folder.mkdir(parents=True)
            for number in range(10):
                (folder / f"{number}{(tmp_path / name).suffix}").symlink_to(tmp_path / name)
        textures = outcome(load_textures, tmp_path / f"textures of {name}", None)
        assert textures is None or textures[0].shape == (10, 3, 150, 150)
        assert textures is not None or not good or name.endswith(".gif"), name


def test_odd_tables_of_counterfactuals(tmp_path):
    columns = "file,shape,texture,background"

    def read(rows, table=columns, newline="\n", mark=b""):
        folder = tmp_path / "set"
        (folder / "counterfactual").mkdir(parents=True, exist_ok=True)
        for number in range(2):
            Image.new("RGB", (8, 8)).save(folder / "counterfactual" / f"{number}.jpg")
        (folder / "labels.csv").write_bytes(mark + newline.join([table, *rows, ""]).encode())
        return outcome(counterfactual_images, [folder])

    good = ["counterfactual/0.jpg,1,2,3", "counterfactual/1.jpg,4,5,6"]
    for odd in ({}, {"newline": "\r\n"}, {"mark": b"\xef\xbb\xbf"}, {"table": columns + ",note"}):
        assert read(good, **odd)[1].tolist() == [[1, 2, 3], [4, 5, 6]], odd
    for bad in (
        [],
        good[:1],
        [*good, good[0]],
        [good[0], "counterfactual/1.jpg,4,5"],
        [good[0], "counterfactual/1.jpg,4,5,x"],
        [good[0], "counterfactual/1.jpg,4,5,1000"],
        [good[0], "counterfactual/1.jpg,4,5,-1"],
        [good[0], "../set/counterfactual/1.jpg,4,5,6"],
        [good[0], "/etc/hostname,4,5,6"],
        [good[0], "\0,4,5,6"],
        [good[0], "counterfactual/1.jpg," + "9" * 5_000 + ",5,6"],
        [good[0], '"counterfactual/1.jpg,4,5,6'],
    ):
        assert read(bad) is None, bad
    assert read(good, table="file,shape,texture") is None and read(good, mark=b"\xff\xfe") is None


@SOAK
def test_a_table_of_ten_million_rows(tmp_path):
    """One line tells that files are missing, after a minute and with a few gigabytes."""
    (tmp_path / "set" / "counterfactual").mkdir(parents=True)
    with open(tmp_path / "set" / "labels.csv", "w") as file:
        file.write("file,shape,texture,background\n")
        file.writelines(f"counterfactual/{number:07d}.jpg,1,2,3\n" for number in range(10**7))
    with pytest.raises(UserError, match="9999999 more: a row without its file"):
        counterfactual_images([tmp_path / "set"])


def test_a_log_with_a_damaged_line(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(
        b'{"step": 1}\n{"step": 2, "x": \xff}\n[3]\n{"step": 9}\n{"st'
    )
    Log(tmp_path / "log.jsonl", 5).write(6, x=1.0)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 6, "x": 1.0}\n'


def test_a_log_of_an_epoch_that_will_be_evaluated_again(tmp_path):
    for epoch in (1, 2):
        Log(tmp_path / "log.jsonl", 3, 1).write(3, epoch=epoch)  # killed before it was saved
    assert (
        tmp_path / "log.jsonl"
    ).read_text() == '{"step": 3, "epoch": 1}\n{"step": 3, "epoch": 2}\n'
    Log(tmp_path / "log.jsonl", 3, 1)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 3, "epoch": 1}\n'


# --------------------------------------------------------------------------------------------------
# Memory


def resident(process):
    """Megabytes of memory that a process holds."""
    with open(f"/proc/{process.pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def watch(script, flags, seconds=1.0):
    """Run a script to its end. Returns (moments, 2): seconds, and megabytes of its memory then.

    Without the first third.
    """
    process, begun, seen = start(script, *flags), time.time(), []
    while process.exitcode is None:
        try:
            seen.append((time.time() - begun, resident(process)))
        except (OSError, StopIteration):  # it has just ended
            break
        process.join(seconds)
    process.join()
    assert process.exitcode == 0
    return torch.tensor(seen[len(seen) // 3 :], dtype=torch.float64)


FAULTS = """
import resource, torch
from data import runs

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
runs.pick_device("cpu")
faults()  # until the heap has grown to its size
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep it")
def test_large_tensors_on_a_cpu_take_the_memory_of_the_last_ones():
    python = [sys.executable, "-c", FAULTS]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10


LONG_RUNS = {
    "training": "train_cgn.py --dataset colored_mnist TINY --max-steps 2000 --log-every 50"
    " --save-every 100",
    "imagenet training": "train_cgn.py --dataset imagenet --preset small --offline --batch-size 1"
    " --max-steps 300 --save-every 50 --sample-every 0",
    "classifier": "train_classifier.py --dataset wildlife_mnist --data-dir DIGITS --epochs 200",
}


@SOAK
@pytest.mark.parametrize("name", LONG_RUNS)
def test_memory_of_long_runs_is_flat(digits_dir, tiny, tmp_path, name):
    """2,000 steps, or two minutes of them. The memory's slope is printed: see it with -s."""
    command = LONG_RUNS[name].replace("TINY", " ".join(tiny)).replace("DIGITS", str(digits_dir))
    script, *flags = command.split()
    seen = watch(script, [*flags, "--device", "cpu", "--out", tmp_path / "run"])
    moments, memory = seen.unbind(1)
    centered = moments - moments.mean()
    slope = 60 * (centered * memory).sum() / centered.square().sum()  # by least squares
    tenth = len(memory) // 10 + 1
    growth = memory[-tenth:].mean() - memory[:tenth].mean()
    print(f"\n{name}: {memory.mean():.0f} MB, {slope:+.2f} MB a minute over {moments[-1]:.0f} s")
    print(f"last tenth against first: {growth:+.1f} MB")
    assert growth < 0.05 * memory.mean()


@SOAK
def test_a_million_counterfactuals_need_no_more_memory_than_ten_thousand(untrained, tmp_path):
    """The memory goes up and down by a chunk, and its peak is a matter of chance: medians."""
    typical = {}
    for n in (10_000, 1_000_000):
        flags = ["--weights", untrained, "--n", n, "--device", "cpu", "--out", tmp_path / str(n)]
        seen = watch("generate.py", flags, 0.2)
        typical[n] = seen[len(seen) // 4 :, 1].median().item()
    quarters = [part[:, 1].median().item() for part in seen.chunk(4)]
    print(f"\nmemory in MB: {typical}, quarters {quarters}, peak {seen[:, 1].max():.0f}")
    assert typical[1_000_000] < 1.1 * typical[10_000] and quarters[-1] < 1.03 * quarters[1]
