"""generate.py --shapes real: the shapes of photographs, for which drawn scenes stand here."""

import csv
import shutil
import sys
import time

import pytest
import torch
from conftest import run, start
from PIL import Image

import generate
from data import imagenet, pictures, runs
from data.pretrained.scenes import draw_scenes, write_scenes
from train_cgn import truncated_normal

COUNT = 14  # pictures of the whole data set, two of each photograph


def draw_photographs():
    """PIL images of eight scenes, whose objects U^2-Net finds also without their colors, and of a
    background alone.
    """
    generator = torch.Generator().manual_seed(7)
    z = truncated_normal((8, 32), generator)
    scenes = draw_scenes(z, torch.randn(8, 32, generator=generator), 96)
    images = torch.cat([scenes.image, scenes.background[:1]])
    pixels = pictures.to_unit(images).mul(255).round().to(torch.uint8)
    return [pictures.to_pil(image) for image in pixels]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven photographs of three classes: of all kinds of files, one empty, one damaged."""
    root = tmp_path_factory.mktemp("photographs")
    wnids = imagenet.imagenet_metadata()["wnids"]
    for name in (wnids[1], wnids[3], wnids[400]):
        (root / name).mkdir()
    *scenes, empty = draw_photographs()
    scenes[0].crop((0, 8, 96, 88)).save(root / wnids[3] / "wide.JPG")
    empty.save(root / wnids[3] / "empty, of grass.png")
    scenes[1].convert("RGBA").save(root / wnids[400] / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, and to be turned upright
    scenes[2].rotate(180).save(root / wnids[400] / "b.webp", exif=exif, lossless=True)
    (root / wnids[400] / "c.jpg").write_bytes(b"no photograph")
    scenes[3].convert("L").save(root / wnids[1] / "gray.png")
    wide = scenes[1].convert("L").point(lambda value: 257 * value, "I")
    wide.convert("I;16").save(root / wnids[1] / "of 16 bits.png")
    return root


@pytest.fixture(scope="module")
def command(small_cgn):
    """generate.py for real shapes in batches of 4, without --images, --n and --out."""
    flags = "--dataset imagenet --shapes real --device cpu --batch-size 4 --format png".split()
    flags += "--save counterfactual mask premask".split()
    return ["generate.py", *flags, "--weights", small_cgn / "weights.pt"]


def read_table(path):
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_all(out):
    """Name -> bytes of the pictures and tables in a folder."""
    files = [*out.glob("*/*.png"), *out.glob("*.csv")]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def read_image(path):
    """A picture as a tensor, uint8 (3, H, W)."""
    return pictures.pil_to_tensor(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def whole(command, folder, tmp_path_factory):
    """The folder of 14 pictures made in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run(*command, "--images", folder, "--n", COUNT, "--out", out)
    assert f"10 of {COUNT} images (4 left out, see left_out.csv)" in done.stdout
    return out


def test_each_picture_has_the_shape_of_its_photograph(whole, folder):
    files, labels = imagenet.photograph_images(folder)
    assert labels.tolist() == [1, 1, 3, 3, 400, 400, 400]
    transform = imagenet.make_transform(False, 64, margin=False)
    photographs = imagenet.Images(files, labels, transform, upright=True)
    rows = read_table(whole / "labels.csv")
    everything = list(range(1000))
    for row in rows:
        index = int(row["file"][-11:-4])
        number = index % 7
        assert row["source"] == str(files[number].relative_to(folder))
        _, y = generate.sample_image(0, index, 32, [everything] * 3)
        y[0] = labels[number]  # texture and background are those of generated shapes
        assert [int(row[head]) for head in imagenet.HEADS] == y.tolist()
        premask = read_image(whole / "premask" / f"{index:07d}.png")
        assert torch.equal(premask, photographs.load(number))
    assert len({(whole / row["file"]).read_bytes() for row in rows}) == 10
    for number in (0, 3, 5):  # the same shape twice
        masks = [whole / "mask" / f"{index:07d}.png" for index in (number, number + 7)]
        assert masks[0].read_bytes() == masks[1].read_bytes()


def test_left_out_pictures_are_named_and_not_made_again(whole, command, folder, tmp_path):
    rows = read_table(whole / "left_out.csv")
    assert [int(row["index"]) for row in rows] == [2, 6, 9, 13]
    for row in rows[::2]:
        assert row["source"] == "n01491361/empty, of grass.png"
        assert 0 <= float(row["reason"].removeprefix("mean mask ")) < 0.05
    for row in rows[1::2]:
        assert list(row.values())[1:] == ["n02669723/c.jpg", "damaged, too large or no image"]
    shutil.copytree(whole, tmp_path / "out")
    done = run(*command, "--images", folder, "--n", COUNT, "--out", tmp_path / "out", "--resume")
    assert f"{COUNT}/{COUNT}" not in done.stdout  # no batch was made
    assert read_all(tmp_path / "out") == read_all(whole)


def test_killed_run_resumes_to_the_same_pictures_and_tables(whole, command, folder, tmp_path):
    out = tmp_path / "out"
    flags = [*command, "--images", folder, "--n", COUNT, "--out", out]
    process = start(*flags)
    while len(list(out.glob("mask/[0-9]*.png"))) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    text = (out / "left_out.csv").read_text()
    assert text.count("\n") > 1
    (out / "left_out.csv").write_text(text[:-3])  # as if it had hit the writing of a row
    run(*flags, "--resume")
    assert read_all(out) == read_all(whole)


def test_a_classifier_takes_the_folder(whole, folder, tmp_path):
    _, labels = imagenet.counterfactual_images([whole])
    assert labels.shape == (10, 3)
    for split in ("train", "val"):
        shutil.copytree(folder / "n01443537", tmp_path / split / "n01443537")
    flags = "--dataset imagenet --offline --arch resnet18 --workers 0 --device cpu --epochs 1"
    sizes = "--image-size 32 --batch-size 2".split()
    data = ["--data-dir", tmp_path, "--counterfactual", whole, "--out", tmp_path / "out"]
    run("train_classifier.py", *flags.split(), *sizes, *data)
    assert "counterfactual" in (tmp_path / "out" / "results.md").read_text()


# --------------------------------------------------------------------------------------------------
# In this process, which saves two seconds each


def generate_here(monkeypatch, *flags):
    """generate.py with these flags."""
    monkeypatch.setattr(sys, "argv", list(map(str, flags)))
    generate.main()


def test_two_ranks_make_one_part_and_one_makes_the_other(
    whole, command, folder, tmp_path, monkeypatch, capsys
):
    flags = [*command, "--images", folder, "--out", tmp_path]
    for rank in range(2):  # one after the other
        with monkeypatch.context() as patch:
            patch.setattr(runs, "rank_and_world_size", lambda: (rank, 2))
            generate_here(patch, *flags, "--start", 5, "--n", COUNT - 5, "--resume")
    left = read_table(tmp_path / "left_out.csv")
    assert [int(row["index"]) for row in left] == [6, 13, 9]  # in the order of ranks
    generate_here(monkeypatch, *flags, "--n", COUNT, "--resume")
    assert read_all(tmp_path) == read_all(whole)


def test_plain_folder_moved_and_changed(command, folder, tmp_path, monkeypatch, capsys):
    before = tmp_path / "before"
    shutil.copytree(folder / "n01443537", before)
    out = tmp_path / "out"
    flags = [*command, "--n", 3, "--out", out, "--images"]
    with pytest.raises(runs.UserError, match="need --shape"):
        generate_here(monkeypatch, *flags, before)
    with pytest.raises(runs.UserError, match="need --shape"):
        generate_here(monkeypatch, *flags, before, "--shape", "tabby", "zebra")
    flags[1:1] = ["--shape", "zebra"]
    generate_here(monkeypatch, *flags, before)
    rows = read_table(out / "labels.csv")
    assert [row["source"] for row in rows] == ["gray.png", "of 16 bits.png", "gray.png"]
    assert {row["shape_name"] for row in rows} == {"zebra"}

    made = read_all(out)
    after = before.rename(tmp_path / "after")
    (out / "labels.csv").unlink()
    generate_here(monkeypatch, *flags, after, "--resume")
    assert read_all(out) == made
    with open(after / "gray.png", "ab") as file:
        file.write(b"more")
    with pytest.raises(runs.UserError, match="made with images_sha256"):
        generate_here(monkeypatch, *flags, after, "--resume")
    assert read_all(out) == made


def test_folder_where_nothing_can_be_used(command, folder, tmp_path, monkeypatch, capsys):
    flags = [*command, "--images", folder, "--n", 2, "--out", tmp_path, "--mask-range", "0.98", "1"]
    with pytest.raises(runs.UserError, match="none of 2 images could be used, see .*left_out.csv"):
        generate_here(monkeypatch, *flags)
    assert len(read_table(tmp_path / "left_out.csv")) == 2
    assert read_table(tmp_path / "labels.csv") == []


def test_sheet_and_interpolation(command, folder, tmp_path, monkeypatch, capsys):
    script, *flags = command
    kept = [script, *flags[:6], *flags[-2:], "--images", folder]
    generate_here(monkeypatch, *kept, "--out", tmp_path / "sheet")
    sheet = Image.open(tmp_path / "sheet" / "sheet.png")
    assert sheet.height == 16 + 8 * 66
    morph = [*kept, *"--interpolate all --to zebra --frames 3 --out".split(), tmp_path / "morph"]
    generate_here(monkeypatch, *morph)
    frames = [read_image(tmp_path / "morph" / f"frame_{index:03d}.png") for index in range(3)]
    assert not torch.equal(frames[0], frames[2])
    with pytest.raises(runs.UserError, match="empty, of grass.png: mean mask 0"):
        generate_here(monkeypatch, *morph, "--start", 2, "--resume")


def test_drawn_scenes_serve_as_photographs(tmp_path):
    write_scenes(tmp_path, 3, torch.Generator().manual_seed(0))
    files, labels = imagenet.photograph_images(tmp_path)
    assert sorted(path.name for path in files) == ["0000.png", "0001.png", "0002.png"]
    wnids = imagenet.imagenet_metadata()["wnids"]
    assert labels.tolist() == [wnids.index(path.parent.name) for path in files]
    assert read_image(files[0]).float().std() > 10


def test_classes_of_shape_choose_photographs(folder):
    files, labels = imagenet.photograph_images(folder, [400, 3])
    assert [path.parent.name for path in files] == 2 * ["n01491361"] + 3 * ["n02669723"]
    assert labels.tolist() == [3, 3, 400, 400, 400]
    with pytest.raises(runs.UserError, match="no folder of --shape 5 6"):
        imagenet.photograph_images(folder, [5, 6])


def test_folders_that_hold_something_else(folder, tmp_path):
    for problem in ("no such folder", "neither images nor folders", "not the WNID", "both images"):
        with pytest.raises(runs.UserError, match=problem):
            imagenet.photograph_images(tmp_path / "x")
        if problem == "no such folder":
            (tmp_path / "x").mkdir()
        elif problem.startswith("neither"):
            shutil.copytree(folder / "n01443537", tmp_path / "x" / "n0")
        else:
            shutil.copy(folder / "n01443537" / "gray.png", tmp_path / "x")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--shapes real", "--shapes real: needs --images"),
        ("--images .", "--images: needs --shapes real"),
        ("--mask-range 0 1", "--mask-range: needs --shapes real"),
        ("--shapes real --images . --mask-range 0.5 0.5", "LOW should be below HIGH"),
        ("--shapes real --images . --mask-range 0.5", "expected 2 arguments"),
        ("--shapes real --images . --interpolate tour --to 3", "tour: moves the shape"),
        ("--shapes real --images nowhere", "no such folder"),
        ("--shapes drawn", "invalid choice"),
    ],
)
def test_wrong_arguments(flags, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(words, "generate.py", "--dataset", "imagenet", "--offline", *flags.split())
