"""Labelled images: IDX files that are whole, and every way in which they may not be."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mechsub.api import analyze_run, plan_experiment, run_experiment, verify_run
from mechsub.errors import RecipeError, RunDirectoryError
from mechsub.families.classifier.config import DataConfig
from mechsub.families.classifier.data import describe_data, load_images
from mechsub.recipe import load_recipe

PARTS = {"train-images": "idx3", "train-labels": "idx1", "t10k-images": "idx3", "t10k-labels": "idx1"}


def idx_bytes(array):
    magic = 2051 if array.ndim == 3 else 2049
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, num_train=700, num_test=200, zipped=False) -> dict[str, Path]:
    """A small set in MNIST's format: each class has its own bright rows, so that it can be learnt."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, count in (("train", num_train), ("t10k", num_test)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 80, (count, 10, 6))
        images[np.arange(count), labels] += 170
        for kind, array in (("images", images), ("labels", labels)):
            name = f"{split}-{kind}-{PARTS[f'{split}-{kind}']}-ubyte"
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
            paths[f"{split}-{kind}"] = path
    return paths


def describe(folder: Path):
    return describe_data(DataConfig(name="mnist", path=str(folder)))


def settings_for(folder: Path) -> list[str]:
    return [f"data={{name: mnist, path: {folder}}}"]


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_as_they_were_written(tiny_recipe, tmp_path, zipped):
    write_idx(tmp_path / "idx", zipped=zipped)
    run = run_experiment(tiny_recipe, tmp_path / "run", settings_for(tmp_path / "idx"), device="cpu", workers=0)
    images = load_images(run.path, torch.float32, "cpu")
    assert images.train_bytes.shape == (700, 60) and images.test_images().shape == (200, 60)
    assert images.train_images(torch.tensor([3]))[0].view(10, 6)[3].min() > 170 / 127.5 - 1
    assert images.test_images().min() >= -1 and images.test_images().max() <= 1
    assert images.test_labels.tolist() == [number % 10 for number in range(200)]


def test_a_run_needs_its_images_no_longer_once_it_has_begun(tiny_recipe, tmp_path):
    paths = write_idx(tmp_path / "idx")
    run = run_experiment(tiny_recipe, tmp_path / "run", settings_for(tmp_path / "idx"), device="cpu", workers=0)
    for path in paths.values():
        path.unlink()
    assert verify_run(run.path) == []
    assert analyze_run(run.path, ["behaviour"], device="cpu", workers=0).is_file()
    (run.path / "data/images.safetensors").write_bytes(b"other")
    with pytest.raises(RunDirectoryError, match="data/images.safetensors has changed since stage data made it"):
        analyze_run(run.path, ["behaviour"], device="cpu", workers=0)


def test_other_images_under_the_same_path_are_another_experiment(tiny_recipe, tmp_path):
    write_idx(tmp_path / "idx")
    run_experiment(tiny_recipe, tmp_path / "run", settings_for(tmp_path / "idx"), device="cpu", workers=0)
    write_idx(tmp_path / "idx", num_test=210)
    with pytest.raises(RunDirectoryError, match="stage data in .* was made by mechsub .* from other arguments"):
        plan_experiment(load_recipe(tiny_recipe, settings_for(tmp_path / "idx")), tmp_path / "run")


def damage(paths: dict[str, Path], how: str) -> None:
    images, labels = paths["train-images"], paths["train-labels"]
    if how == "missing":
        labels.unlink()
    elif how == "header":
        images.write_bytes(images.read_bytes()[:9])
    elif how == "misnamed":
        images.write_bytes(labels.read_bytes())
    elif how == "alien":
        images.write_bytes(b"\x89PNG" + bytes(20))
    elif how == "counts":
        labels.write_bytes(idx_bytes(np.zeros(699)))
    elif how == "sizes":
        paths["t10k-images"].write_bytes(idx_bytes(np.zeros((200, 5, 6))))
    elif how == "bits":
        content = bytearray(gzip.compress(images.read_bytes()))
        content[200:240] = bytes(40)
        images.with_name(f"{images.name}.gz").write_bytes(bytes(content))
        images.unlink()
    elif how == "unnamed":
        images.write_bytes(gzip.compress(images.read_bytes()))
    elif how == "gzip":
        images.rename(images.with_name(f"{images.name}.gz"))
    else:
        images.write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "lacks MNIST's train-labels; looked for train-labels-idx1-ubyte, train-labels-idx1-ubyte.gz"),
        ("header", "is truncated: 9 bytes, its header alone has 16"),
        ("empty", "is truncated: 0 bytes"),
        ("misnamed", "should hold train-images: magic number 2051, found 2049, which means labels"),
        ("alien", "found 2303741511, which is not IDX"),
        ("unnamed", r"which is gzip's: give its name the ending .gz"),
        ("counts", r"holds 700 images, .* 699 labels; they do not belong together"),
        ("sizes", "differ in size: 10 × 6 for training, 5 × 6 for testing"),
        ("gzip", r"\.gz cannot be read .* damaged or truncated"),
    ],
)
def test_files_that_contradict_themselves_are_refused_before_anything_is_written(tiny_recipe, tmp_path, how, message):
    damage(write_idx(tmp_path / "idx"), how)
    with pytest.raises(RecipeError, match=message):
        plan_experiment(load_recipe(tiny_recipe, settings_for(tmp_path / "idx")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_zipped_file_with_broken_bits_is_refused(tiny_recipe, tmp_path):
    damage(write_idx(tmp_path / "idx"), "bits")
    with pytest.raises(RecipeError, match=r"\.gz cannot be read .* damaged or truncated"):
        run_experiment(tiny_recipe, tmp_path / "run", settings_for(tmp_path / "idx"), device="cpu", workers=0)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_that_is_cut_off_is_refused(tiny_recipe, tmp_path, zipped):
    path = write_idx(tmp_path / "idx", zipped=zipped)["t10k-images"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RecipeError, match="is truncated: its header states 200 × 10 × 6|damaged or truncated"):
        run_experiment(tiny_recipe, tmp_path / "run", settings_for(tmp_path / "idx"), device="cpu", workers=0)


def test_labels_beyond_the_classes_are_refused(tiny_recipe, tmp_path):
    write_idx(tmp_path / "idx")["t10k-labels"].write_bytes(idx_bytes(np.full(200, 11)))
    with pytest.raises(RecipeError, match="the test labels reach 11; there are 10 classes, from 0"):
        run_experiment(tiny_recipe, tmp_path / "run", settings_for(tmp_path / "idx"), device="cpu", workers=0)


def test_a_source_that_is_not_given_or_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no source: give the folder .* --set data.path=FOLDER"):
        plan_experiment("mnist", tmp_path / "run")
    with pytest.raises(RecipeError, match="there is no folder /nowhere"):
        plan_experiment("mnist", tmp_path / "run", ["data.path=/nowhere"])
    with pytest.raises(RecipeError, match="digits come with scikit-learn and have no path or hub"):
        load_recipe("digits", ["data.path=/nowhere"])
    with pytest.raises(RecipeError, match="either path or hub"):
        load_recipe("mnist", ["data.path=/nowhere", "data.hub=ylecun/mnist"])


def test_real_images_as_carrier_cannot_be_more_than_there_are(tiny_recipe, tmp_path):
    settings = ["carrier.inputs=images", "carrier.num_images=1500"]
    with pytest.raises(RecipeError, match=r"1500, but there are 1438 training images to make images of"):
        plan_experiment(load_recipe(tiny_recipe, settings), tmp_path / "run")


def test_a_hub_data_set_gives_what_the_idx_files_give(tiny_recipe, tmp_path, monkeypatch):
    """A local data set in the hub's format: parquet with encoded images."""
    datasets = pytest.importorskip("datasets", reason="needs the datasets extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_idx(tmp_path / "idx", num_train=60, num_test=20)
    from mechsub.families.classifier.idx import find_idx_files, read_idx

    files = find_idx_files(tmp_path / "idx")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    (tmp_path / "hub").mkdir()
    for split, part in (("train", "train"), ("test", "t10k")):
        columns = {"image": list(read_idx(files[f"{part}-images"], "train-images"))}
        columns["label"] = read_idx(files[f"{part}-labels"], "train-labels").tolist()
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"hub/{split}-00000-of-00001.parquet")
    sources = {"idx": f"path: {tmp_path / 'idx'}", "hub": f"hub: {tmp_path / 'hub'}"}
    runs = {}
    for name, source in sources.items():
        settings = [f"data={{name: mnist, {source}}}", "teacher.batch_size=30"]
        run = run_experiment(tiny_recipe, tmp_path / name / "run", settings, device="cpu", workers=0)
        runs[name] = load_images(run.path, torch.float32, "cpu")
    assert torch.equal(runs["idx"].train_bytes, runs["hub"].train_bytes)
    assert torch.equal(runs["idx"].test_labels, runs["hub"].test_labels)
