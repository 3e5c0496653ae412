"""ImageNet's classifier ensemble: folders, metrics against hand-computed numbers, and the whole chain on a miniature."""
import csv
import functools
import hashlib
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import types

import pytest
import torch
import torchvision
from PIL import Image

from conftest import ROOT, SOAK, check_kills, run, torchrun
from data import weights
from data.explain import heat_maps, intersection_over_union
from data.imagenet import (Images, batches, counterfactual_images, cue_conflict_images, decode, facts, imagenet9_images,
                           normalized, transform, validation_images, wnid_images)
from data.robustness import conflict_hits, count_hits, evaluate, imagenet9_hits, top_hits
from data.runs import Log, UserError
from train_classifier import (Ensemble, ensemble_loss, epoch_order, learning_rate, load_baseline, load_ensemble,
                              parse_args)

CLASSES = [0, 1, 400, 999]


def picture(path, colour=(200, 30, 30), size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A folder like ImageNet's: 4 classes, 3 images each to train, 7 in val; Cue-Conflict and ImageNet-9 beside it."""
    root = tmp_path_factory.mktemp("miniature")
    generator = torch.Generator().manual_seed(0)
    for number in CLASSES:
        for i in range(3):
            colour = tuple(torch.randint(256, (3,), generator=generator).tolist())
            picture(root / "imagenet" / "train" / facts()["wnids"][number] / f"{i}.JPEG", colour)
            if i < 2 and (number, i) != (999, 1):
                picture(root / "imagenet" / "val" / facts()["wnids"][number] / f"{i}.JPEG", colour, (50, 40))
    for name in ("cat1-dog2", "cat3-cat1", "dog10-truck2"):
        picture(root / "cue" / name.rstrip("0123456789").split("-")[0].rstrip("0123456789") / f"{name}.png")
    for variant in ("original", "mixed_same", "mixed_rand"):
        for name in ("00_dog", "02_wheeled vehicle", "08_fish"):
            picture(root / "in9" / variant / "val" / name / "a.JPEG", (20, 200, 90))
    return root


@pytest.fixture(scope="module")
def counterfactuals(small_cgn, tmp_path_factory):
    out = tmp_path_factory.mktemp("counterfactuals") / "set"
    run("generate.py", "--dataset", "imagenet", "--weights", small_cgn / "weights.pt", "--device", "cpu", "--n", 9, "--batch-size",
        3, "--save", "counterfactual", "mask", "--out", out)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_folders_by_wnid_and_flat_ones(miniature, tmp_path):
    paths, labels = wnid_images(miniature / "imagenet" / "train")
    assert len(paths) == 12 and labels.tolist() == [c for c in CLASSES for _ in range(3)]
    assert len(validation_images(miniature / "imagenet")[0]) == 7
    for i, name in enumerate("abc"):
        picture(tmp_path / "flat" / "val" / f"{name}.JPEG")
    with pytest.raises(UserError, match="meta.bin"):
        validation_images(tmp_path / "flat")
    torch.save(({}, [facts()["wnids"][c] for c in (5, 3, 5)]), tmp_path / "flat" / "meta.bin")
    assert validation_images(tmp_path / "flat")[1].tolist() == [5, 3, 5]
    (tmp_path / "odd" / "n01440764").mkdir(parents=True)
    with pytest.raises(UserError, match="n01440764: no images in this class"):
        wnid_images(tmp_path / "odd")
    (tmp_path / "other" / "cats").mkdir(parents=True)
    for name in ("7", "123"):                                                    # as ImageNet-V2 has them
        picture(tmp_path / "v2" / name / "a.jpeg")
    assert wnid_images(tmp_path / "v2")[1].tolist() == [123, 7]
    for folder, words in ((tmp_path / "other", "not the WNID"), (tmp_path / "nowhere", "no such folder"),
                          (tmp_path / "odd" / "n01440764", "holds no folders")):
        with pytest.raises(UserError, match=words):
            wnid_images(folder)


def test_robustness_folders(miniature, tmp_path):
    paths, labels = cue_conflict_images(miniature / "cue")
    names = list(facts()["cue_conflict"]["categories"])
    assert [path.stem for path in paths] == ["cat1-dog2", "dog10-truck2"]        # cat3-cat1 tells nothing
    assert labels.tolist() == [[names.index(a), names.index(b)] for a, b in (("cat", "dog"), ("dog", "truck"))]
    picture(tmp_path / "cue" / "cat" / "mouse1-cat2.png")
    with pytest.raises(UserError, match="mouse1-cat2.png: not named"):
        cue_conflict_images(tmp_path / "cue")
    found = imagenet9_images(miniature / "in9")
    assert set(found) == {"original", "mixed_same", "mixed_rand"} and found["original"][1].tolist() == [0, 2, 8]
    with pytest.raises(UserError, match="no variant of ImageNet-9"):
        imagenet9_images(miniature / "imagenet")


def test_counterfactual_folders(counterfactuals, tmp_path):
    paths, labels = counterfactual_images([counterfactuals, counterfactuals.parent / "s*"])     # the same one twice
    assert len(paths) == 9 and labels.shape == (9, 3) and all(path.is_file() for path in paths)
    with open(counterfactuals / "labels.csv", newline="") as file:
        assert labels.tolist() == [[int(row[k]) for k in ("shape", "texture", "background")] for row in csv.DictReader(file)]

    def broken(change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(counterfactuals, tmp_path / "copy")
        change(tmp_path / "copy")
        with pytest.raises(UserError) as caught:
            counterfactual_images([tmp_path / "copy"])
        return str(caught.value)

    def table(function):
        return lambda folder: (folder / "labels.csv").write_text(function((folder / "labels.csv").read_text()))

    assert "0000004.jpg and 0 more: a row without its file" in broken(
        lambda folder: (folder / "counterfactual" / "0000004.jpg").unlink())
    assert "0000000.jpg and 0 more: a file without its row" in broken(
        table(lambda text: "\n".join(line for line in text.splitlines() if "0000000" not in line)))
    assert "0 to 999 exist" in broken(table(lambda text: re.sub(r"(0000008\.jpg),\d+", r"\1,1000", text)))
    assert "no readable labels.csv" in broken(table(lambda text: text.replace("texture,", "", 1)))
    assert "no readable labels.csv" in broken(lambda folder: (folder / "labels.csv").unlink())
    with pytest.raises(UserError, match="no such folder"):
        counterfactual_images([tmp_path / "no*"])


def test_damaged_images_are_named_and_left_out(tmp_path, capsys, monkeypatch):
    paths = [picture(tmp_path / f"{i}.jpg") for i in range(6)]
    paths[2].write_bytes(b"")
    paths[4].write_bytes(paths[0].read_bytes()[:300])
    images = Images(paths, torch.arange(6), transform(False, 32))
    found = list(batches(images, range(6), 4, 0, torch.device("cpu")))
    assert [labels.tolist() for _, labels in found] == [[0, 1, 3], [5]] and found[0][0].dtype == torch.uint8
    assert "2.jpg: damaged" in capsys.readouterr().err
    monkeypatch.setattr("data.imagenet.DAMAGED", 1)
    with pytest.raises(UserError, match="more than 1 damaged images"):
        list(batches(images, range(6), 4, 0, torch.device("cpu")))


def test_decoding_by_batch_gives_the_same_images(tmp_path, capsys):
    """The form for GPUs, on the CPU: JPEG of any kind, PNG with 16 bits and palettes, damaged files."""
    gradient = torch.arange(50 * 60 * 3).view(50, 60, 3).remainder(251).byte().numpy()
    paths = [tmp_path / name for name in ("a.jpg", "b.jpg", "c.png", "d.png", "e.jpg", "f.jpg")]
    for path, image in zip(paths, (Image.fromarray(gradient), Image.new("CMYK", (30, 40), (10, 50, 90, 0)),
                                   Image.new("I;16", (40, 30), 0x8080), Image.new("P", (40, 30), 3))):
        image.save(path)
    paths[4].write_bytes(paths[0].read_bytes()[:300])
    both = []
    for device in (None, torch.device("cpu")):
        images = Images(paths, torch.arange(6), transform(True, 32), seed=3, device=device)
        both.append(list(batches(images, [0, 1, 2, 3, 4, 5], 4, 0, torch.device("cpu"))))
        assert capsys.readouterr().err.count("damaged") == 2
    (x, y), = both[0]
    assert torch.equal(x, both[1][0][0]) and torch.equal(y, both[1][0][1]) and y.tolist() == [0, 1, 2, 3]
    assert x[1].float().mean((1, 2)).round().tolist() == [245, 205, 165] and (x[2] == 128).all()
    assert decode([torch.zeros(0, dtype=torch.uint8)]) == [None]


def test_normalisation_and_what_tests_see_of_an_image():
    image = torch.arange(224 * 224 * 3).remainder(256).byte().view(3, 224, 224)
    assert torch.equal(transform(False, 224, margin=False)(image), image)        # ImageNet-9 comes as it is to be seen
    assert transform(False, 224)(image).shape == (3, 224, 224)
    batch = torch.stack([image] * 5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (batch / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(normalized(batch), expected, atol=1e-5)
    assert normalized(batch).is_contiguous(memory_format=torch.channels_last)


def test_augmentation_depends_on_seed_epoch_and_number_alone(tmp_path):
    gradient = torch.arange(50 * 60 * 3).view(50, 60, 3).remainder(251).byte().numpy()
    Image.fromarray(gradient).save(tmp_path / "a.png")
    images = Images([tmp_path / "a.png"] * 3, torch.arange(3), transform(True, 32), seed=1)
    torch.manual_seed(7)
    first = images[1][0]
    torch.rand(3)
    assert torch.equal(images[1][0], first) and not torch.equal(images[2][0], first)
    images.epoch = 1
    assert not torch.equal(images[1][0], first)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, of answers that are made up


def answers(*rows):
    """Logits (N, 3, 1000) whose heads answer the given classes, surest the first head, then 0, 1, 2, ..."""
    logits = (-1e-3 * torch.arange(1000.0)).repeat(len(rows), 3, 1)
    for n, row in enumerate(rows):
        for head, answer in enumerate(row):
            logits[n, head, answer] = 10.0 - head
    return logits


def test_top_hits_by_hand():
    logits = answers((101, 102, 103), (104, 104, 105), (107, 107, 107))
    # heads: shape, texture, background, mean (the surest one's answer), shape and texture
    assert top_hits(logits, torch.tensor([101, 105, 107]))[:, 0].tolist() == [2, 1, 2, 2, 2]
    # among the best five: shape none, 102, none; then 105; 0 is among everyone's
    assert top_hits(logits, torch.tensor([102, 105, 0]))[:, 1].tolist() == [1, 2, 2, 3, 2]
    own = torch.tensor([[101, 102, 109], [109, 104, 105], [107, 109, 109]])
    assert top_hits(logits, own)[:3, 0].tolist() == [2, 2, 2 - 1]


def test_classes_that_a_test_does_not_have_are_no_choice():
    logits = answers((101, 101, 101))
    logits[..., 6] = 0.5
    assert top_hits(logits, torch.tensor([6]))[:, 0].tolist() == [0] * 5
    assert top_hits(logits, torch.tensor([6]), present=torch.tensor([6, 8, 9, 10, 11]))[:, 0].tolist() == [1] * 5


def test_shape_bias_by_hand():
    categories = facts()["cue_conflict"]["categories"]
    names = list(categories)
    cat, dog, truck = (names.index(name) for name in ("cat", "dog", "truck"))
    logits = torch.zeros(4, 1, 1000)
    for n, name in enumerate(("cat", "dog", "truck", "boat")):
        logits[n, 0, categories[name]] = 20.0
    labels = torch.tensor([[cat, dog], [cat, dog], [dog, truck], [cat, dog]])
    assert conflict_hits(logits, labels).tolist() == [[1, 2]]                    # bias 1 / 3; the boat counts for neither
    # The mean over classes, not the sum: one sure class of many is less than one sure class of one.
    logits = torch.zeros(1, 1, 1000)
    logits[0, 0, categories["airplane"][0]] = logits[0, 0, categories["dog"][0]] = 5.0
    assert conflict_hits(logits, torch.tensor([[names.index("airplane"), dog]])).tolist() == [[1, 0]]


def test_imagenet9_by_hand():
    groups = torch.tensor(facts()["in9"]["imagenet_to_in9"])
    dog, fish, none = ((groups == g).nonzero()[0].item() for g in (0, 8, -1))
    logits = torch.zeros(3, 1, 1000)
    for n, answer in enumerate((dog, fish, none)):
        logits[n, 0, answer] = 1.0
    assert imagenet9_hits(logits, torch.tensor([0, 8, 0])).tolist() == [[2]]


def test_background_gap_and_uneven_batches(miniature):
    """A classifier that answers by colour: right on mixed_same, wrong on mixed_rand for two of three."""
    args = parse_args(["--dataset", "imagenet", "--image-size", "32", "--batch-size", "2", "--workers", "0", "--out", "x"])
    args.bf16 = False
    groups = torch.tensor(facts()["in9"]["imagenet_to_in9"])
    logits = torch.zeros(1000)
    logits[(groups == 0).nonzero()[0]] = 1.0                                     # always a dog
    constant = torch.nn.Module()
    constant.forward = lambda x: logits.expand(len(x), 1000)
    tests = {f"in9 {name}": ("in9", images) for name, images in imagenet9_images(miniature / "in9").items()}
    tests["in9 mixed_same"] = "in9", (tests["in9 mixed_same"][1][0], torch.zeros(3, dtype=torch.int64))
    rows = {row[:3]: row[3:] for row in evaluate(constant, ["baseline"], tests, args, torch.device("cpu"))}
    assert rows["in9 original", "baseline", "top-1"][1:] == (1, 3)
    seen = []
    constant.forward = lambda x: seen.append(x) or logits.expand(len(x), 1000)
    for args.in9_normalization in ("imagenet", "in9"):
        evaluate(constant, ["baseline"], {"in9 original": tests["in9 original"]}, args, torch.device("cpu"))
    by_hand = [((seen[0][0, 0] * 0.229 + 0.485) - 0.4717) / 0.26, seen[2][0, 0]]
    assert torch.allclose(*by_hand, atol=1e-5)
    assert rows["in9", "baseline", "background gap"][0] == pytest.approx(100 - 100 / 3)
    hits, count = count_hits(constant, 1, "val", validation_images(miniature / "imagenet"), top_hits, args, torch.device("cpu"))
    assert count == 7 and hits[0][0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Ensemble and training


def test_one_forward_has_the_gradients_of_two():
    torch.manual_seed(0)
    ensemble = Ensemble("resnet18").double().train()
    assert not any(m.training for m in ensemble.modules() if isinstance(m, torch.nn.BatchNorm2d))
    x, y = torch.randn(5, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2])
    labels, gradients = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), []
    for separate in (False, True):
        ensemble.zero_grad()
        logits = torch.cat([ensemble(x[:2]), ensemble(x[2:])]) if separate else ensemble(x)
        ensemble_loss(logits, y, labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in ensemble.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12 * gradients[0].abs().max()
    by_hand = torch.nn.functional.cross_entropy(logits[:2].float().mean(1), y)
    for head in range(3):
        by_hand += torch.nn.functional.cross_entropy(logits[2:, head].float(), labels[:, head])
    assert ensemble_loss(logits, y, labels).item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("arch", ["resnext50_32x4d", "wide_resnet50_2", "convnext_tiny", "efficientnet_b0", "vit_b_16"])
def test_backbones(arch):
    with torch.device("meta"):
        ensemble = Ensemble(arch, keep_head=False)
        assert ensemble(torch.randn(2, 3, 224, 224)).shape == (2, 3, 1000)


def test_heads_may_begin_as_the_pretrained_one():
    plain = torchvision.models.resnet18()
    ensemble = Ensemble("resnet18", plain.state_dict(), keep_head=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ensemble(x), plain.eval()(x)[:, None].expand(-1, 3, -1))


def test_pretrained_weights_are_fetched_and_checked(tmp_path, monkeypatch):
    """From a server on this machine, under a name like torchvision's, with eight digits of the file's hash."""
    plain = torchvision.models.resnet18()
    (tmp_path / "server").mkdir()
    torch.save(plain.state_dict(), tmp_path / "server" / "it")
    name = f"resnet18-{hashlib.sha256((tmp_path / 'server' / 'it').read_bytes()).hexdigest()[:8]}.pth"
    (tmp_path / "server" / "it").rename(tmp_path / "server" / name)
    shutil.copy(tmp_path / "server" / name, tmp_path / "server" / "resnet18-01234567.pth")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "server")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for file in (name, "resnet18-01234567.pth"):
            entry = types.SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/{file}")
            monkeypatch.setattr(torchvision.models, "get_model_weights", lambda arch: types.SimpleNamespace(DEFAULT=entry))
            monkeypatch.setattr(weights, "FILES", {})
            args = parse_args(["--dataset", "imagenet", "--arch", "resnet18", "--out", "x", "--weights-dir",
                               str(tmp_path / file[:-4])])
            if file == name:
                assert torch.equal(load_baseline(args).fc.weight, plain.fc.weight)
                assert torch.equal(load_ensemble(args).backbone.conv1.weight, plain.conv1.weight)
            else:
                with pytest.raises(UserError, match="resnet18-01234567.pth"):
                    load_baseline(args)
        server.shutdown()


def test_learning_rates_and_orders():
    args = parse_args(["--dataset", "imagenet", "--out", "x"])
    assert (args.epochs, args.batch_size, args.lr) == (45, 256, 0.001)
    assert [learning_rate(args, e) for e in (0, 14.9, 15, 44)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
    args = parse_args(["--dataset", "imagenet", "--schedule", "cosine", "--warmup", "5", "--out", "x"])
    assert learning_rate(args, 2.5) == pytest.approx(5e-4, rel=1e-3)
    assert learning_rate(args, 5) == pytest.approx(1e-3) and learning_rate(args, 45) == pytest.approx(0, abs=1e-9)
    order = epoch_order(5, 3, 4, 0, 0)
    assert len(order) == 12 and all(order.count(n) >= 2 for n in range(5)) and order != epoch_order(5, 3, 4, 0, 1)


FLAGS = ["--dataset", "imagenet", "--offline", "--arch", "resnet18", "--image-size", 32, "--batch-size", 4, "--workers", 0,
         "--device", "cpu", "--amp", "off", "--lr", 0.01]


def folders(miniature, counterfactuals):
    return ["--data-dir", miniature / "imagenet", "--counterfactual", counterfactuals, "--cue-conflict", miniature / "cue",
            "--imagenet9", miniature / "in9", "--ood", f"subset={miniature / 'imagenet' / 'val'}"]


def test_the_whole_chain_resumes_to_the_same_bits_and_on_two_ranks(miniature, counterfactuals, tmp_path):
    common = [*FLAGS, *folders(miniature, counterfactuals)]
    done = run("train_classifier.py", *common, "--epochs", 2, "--ema", 0.5, "--baseline", "--explain", 4, "--out", tmp_path / "whole")
    assert Image.open(tmp_path / "whole" / "explain.png").height > 3 * 32
    assert "8 counterfactuals for 12 in each epoch" in done.stdout and "subset: 4 of 1000 classes" in done.stdout
    run("train_classifier.py", *common, "--epochs", 1, "--ema", 0.5, "--out", tmp_path / "halves")
    run("train_classifier.py", *common, "--epochs", 2, "--ema", 0.5, "--resume", "--out", tmp_path / "halves")
    whole, halves = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "halves"))
    assert whole["epoch"] == halves["epoch"] == 2
    results = (tmp_path / "whole" / "results.json").read_text()
    run("train_classifier.py", *common, "--epochs", 2, "--ema", 0.5, "--baseline", "--resume", "--out", tmp_path / "whole")
    assert (tmp_path / "whole" / "results.json").read_text() == results          # nothing left to do, nothing lost
    for part in ("ensemble", "average"):
        assert all(torch.equal(whole[part][key], halves[part][key]) for key in whole[part])
    rows = json.loads((tmp_path / "whole" / "results.json").read_text())
    counts = {(row["test"], row["head"], row["measure"]): row["images"] for row in rows}
    assert counts["val", "mean", "top-5"] == 7 and counts["counterfactual", "texture", "top-1"] == 1     # a tenth
    assert counts["cue-conflict", "shape", "right shape"] == 2 and counts["in9 mixed_rand", "mean", "top-1"] == 3
    assert ("in9", "shape and texture", "background gap") in counts and counts["val", "baseline", "top-1"] == 7
    assert (tmp_path / "whole" / "results.md").read_text().count("\n|") == len(rows) + 1

    run("train_classifier.py", *common, "--epochs", 1, "--out", tmp_path / "one")
    torchrun(2, "train_classifier.py", *common, "--epochs", 1, "--out", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert [(row["images"], row["hits"]) for row in one] == [(row["images"], row["hits"]) for row in two]
    a, b = (torch.load(tmp_path / name / "weights.pt", weights_only=True)["ensemble"] for name in ("one", "two"))
    assert all((a[key] - b[key]).abs().max() <= 1e-4 * a[key].abs().max() + 1e-6 for key in a if "weight" in key)

    done = run("train_classifier.py", *common, "--evaluate", "--weights", tmp_path / "one" / "weights.pt", "--out",
               tmp_path / "again")
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert [row for row in again if row["test"] != "counterfactual"] == [row for row in one if row["test"] != "counterfactual"]
    assert "| val | mean | top-1 |" in done.stdout
    done = run("train_classifier.py", *common, "--arch", "resnet34", "--evaluate", "--weights",
               tmp_path / "one" / "weights.pt", "--out", tmp_path / "x", expect=2)
    assert "not an ensemble on resnet34" in done.stderr
    done = run("train_classifier.py", *common, "--lr", 0.1, "--resume", "--out", tmp_path / "one", expect=2)
    assert "was trained with lr = 0.01, not 0.1" in done.stderr


def test_sigterm_within_an_epoch_and_resume_give_the_same_bits(miniature, counterfactuals, tmp_path):
    """With a network that has dropout and stochastic depth."""
    common = [*FLAGS, "--arch", "efficientnet_b0", "--data-dir", miniature / "imagenet", "--counterfactual", counterfactuals,
              "--epochs", 3, "--log-every", 1]
    run("train_classifier.py", *common, "--out", tmp_path / "whole")
    flags = [str(flag) for flag in (*common, "--workers", 1, "--out", tmp_path / "cut", "--resume")]
    process = subprocess.Popen([sys.executable, str(ROOT / "train_classifier.py"), *flags], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("4/9 "):                                              # one step of three in the second epoch
            process.terminate()
            break
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "go on with the same command and --resume" in rest
    cut = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert cut["epoch"] == 1 and 4 <= cut["step"] <= 6
    run("train_classifier.py", *flags)
    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(whole["ensemble"][key], cut["ensemble"][key]) for key in whole["ensemble"])
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 9 + 3


@SOAK
def test_killed_ensembles_end_the_same(miniature, counterfactuals, tmp_path):
    flags = [*FLAGS, "--arch", "efficientnet_b0", "--data-dir", miniature / "imagenet", "--counterfactual", counterfactuals,
             "--epochs", 20, "--log-every", 1]
    check_kills("train_classifier.py", flags, tmp_path, 20)


# ---------------------------------------------------------------------------------------------------------------------
# Explanations


def test_heat_maps_of_a_network_whose_map_is_known():
    """The score of head h is the mean of colour h: its heat map is that colour, as bright as it gets."""
    class Colours(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.same = torch.nn.Conv2d(3, 3, 1, bias=False)
            torch.nn.init.dirac_(self.same.weight)
            self.pool = torch.nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            score = self.pool(self.same(x)).flatten(1)
            return torch.stack([-score, score], 2)                               # class 1 is the answer

    x = torch.rand(2, 3, 8, 8) + 0.1
    maps, answers = heat_maps(Colours(), x)
    assert (answers == 1).all() and torch.allclose(maps, x / x.amax((2, 3), keepdim=True), atol=1e-6)
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :2] = True
    hot = torch.zeros(2, 8, 8)
    hot[0, 1:4], hot[1, 0, 0] = 0.6, 0.4
    assert intersection_over_union(hot, masks).tolist() == [8 / 32, 0]


@pytest.mark.parametrize("arch, size", [("resnet18", 64), ("convnext_tiny", 64), ("vit_b_16", 224)])
def test_heat_maps_of_backbones(arch, size):
    torch.manual_seed(0)
    maps, answers = heat_maps(Ensemble(arch), torch.randn(2, 3, size, size))
    assert maps.shape == (2, 3, size, size) and answers.shape == (2, 3) and 0 <= maps.min() and maps.max() == 1
    assert len({maps[0, head].sum().item() for head in range(3)}) == 3 and maps[0, 0].std() > 0


def test_the_digit_classifier_explains_itself(digits_dir, tmp_path):
    common = ["--dataset", "colored_mnist", "--data-dir", digits_dir, "--device", "cpu", "--explain", 5]
    run("train_classifier.py", *common, "--epochs", 1, "--max-steps", 3, "--out", tmp_path / "run")
    numbers = json.loads((tmp_path / "run" / "results.json").read_text())["seeds"]["0"]
    assert 0 <= numbers["heat map IoU"] <= 100 and 5 < numbers["whole image IoU"] < 40
    weights = tmp_path / "run" / "seed_0" / "weights.pt"
    done = run("train_classifier.py", *common, "--evaluate", "--weights", weights, "--out", tmp_path / "tested")
    again = json.loads((tmp_path / "tested" / "results.json").read_text())["seeds"]["0"]
    assert all(again[name] == numbers[name] for name in again) and "heat map IoU" in done.stdout
    assert Image.open(tmp_path / "tested" / "seed_0" / "explain.png").height > 5 * 32


def test_numbers_reach_tensorboard_if_it_is_there(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, *scalar):
            seen.append(scalar)

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard")
    Log(tmp_path / "log.jsonl", 4).write(5, loss=0.5)
    assert seen == [(tmp_path, 5), ("loss", 0.5, 5)]
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 5, "loss": 0.5}


def test_mistakes(miniature, tmp_path):
    for flags, words in ((["--arch", "resnet19", "--data-dir", miniature / "imagenet"], "not a classifier of torchvision"),
                         (["--data-dir", tmp_path / "none"], "no such folder"), ([], "training needs --data-dir"),
                         (["--imagenet9", miniature / "in9", "--evaluate"], "needs --weights"),
                         (["--evaluate", "--weights", "x"], "nothing to evaluate"), (["--seeds", 1, 2], "has no meaning"),
                         (["--data-dir", miniature / "imagenet", "--batch-size", 16], "larger than the 12"),
                         (["--ood", "name", "--data-dir", miniature / "imagenet"], "should be NAME=PATH")):
        done = run("train_classifier.py", *FLAGS, *flags, "--out", tmp_path / "x", expect=2)
        assert words in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "x").exists()
