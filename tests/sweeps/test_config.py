"""A sweep's recipe: which runs it stands for, and what it refuses."""

from pathlib import Path

import pytest

from mechsub.errors import RecipeError
from mechsub.recipe import load_recipe
from mechsub.sweeps.config import is_sweep, load_sweep


@pytest.fixture
def sweep_file(tiny_recipe, tmp_path):
    def write(fields: str, vary: str = "each") -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(f"{tiny_recipe.read_text()}\nsweep: {{vary: {vary}, fields: {fields}}}\n")
        return path

    return write


TWO = "{student.epochs: [1, 2, 3], model.hidden_widths: [[4], [12, 8]]}"


def test_each_field_is_varied_alone_around_the_recipe(sweep_file):
    sweep = load_sweep(sweep_file(TWO))
    assert list(sweep.runs) == ["base", "student.epochs=1", "student.epochs=3", "model.hidden_widths=4"]
    assert sweep.runs["student.epochs=3"].settings == {"student.epochs": 3, "model.hidden_widths": [12, 8]}
    assert sweep.runs["model.hidden_widths=4"].recipe.model.hidden_widths == (4,)
    assert "In this run of a sweep: student.epochs = 3." in sweep.runs["student.epochs=3"].recipe.description


def test_a_product_has_every_combination_and_a_zip_pairs_them(sweep_file):
    product = load_sweep(sweep_file(TWO, "product"))
    assert len(product.runs) == 6 and "student.epochs=2,model.hidden_widths=12,8" in product.runs
    zipped = load_sweep(sweep_file("{student.epochs: [1, 2], members: [3, 4]}", "zip"))
    assert [dict(run.settings) for run in zipped.runs.values()] == [
        {"student.epochs": 1, "members": 3},
        {"student.epochs": 2, "members": 4},
    ]


def test_a_run_keeps_its_name_when_the_sweep_grows(sweep_file):
    few = load_sweep(sweep_file("{student.epochs: [1, 3]}"))
    many = load_sweep(sweep_file("{student.epochs: [4, 3, 1], seed: [5]}"))
    for name in set(few.runs) & set(many.runs):
        assert few.runs[name].recipe == many.runs[name].recipe
    assert set(few.runs) <= set(many.runs)


def test_a_condition_and_a_whole_block_can_be_swept(sweep_file):
    sweep = load_sweep(sweep_file("{conditions.noised-init.noise_std: [0.1], student.optimizer: [{name: sgd}]}"))
    assert sweep.runs["conditions.noised-init.noise_std=0.1"].recipe.conditions["noised-init"].noise_std == 0.1
    (name,) = (name for name in sweep.runs if name.startswith("student.optimizer=name=sgd-"))
    assert sweep.runs[name].recipe.student.optimizer.name == "sgd"


def test_settings_that_come_to_the_same_recipe_are_one_run(sweep_file):
    fields = "{student.epochs: [1, 1, 2], student.optimizer: [{learning_rate: 0.01}], data.test_fraction: [0.2, 0.20]}"
    assert list(load_sweep(sweep_file(fields)).runs) == ["base", "student.epochs=1"]
    zipped = load_sweep(sweep_file("{student.epochs: [1, 2, 3], neutral: [relabelled, shuffled, relabelled]}", "zip"))
    assert len(zipped.runs) == 3


def test_names_that_would_collide_do_not_depend_on_their_order(sweep_file):
    first = load_sweep(sweep_file("{callbacks: [[a b], [a-b]]}"))
    second = load_sweep(sweep_file("{callbacks: [[a-b], [a b]]}"))
    assert {name: run.recipe for name, run in first.runs.items()} == {name: run.recipe for name, run in second.runs.items()}
    assert len(first.runs) == 3


def test_a_long_name_is_cut_and_still_its_own(sweep_file):
    values = ", ".join(f"[{', '.join(['7'] * 60)}, {last}]" for last in (1, 2))
    names = [name for name in load_sweep(sweep_file(f"{{model.hidden_widths: [{values}]}}")).runs if name != "base"]
    assert len(set(names)) == 2 and all(len(name) < 120 for name in names)


@pytest.mark.parametrize(
    ("fields", "vary", "message"),
    [
        (
            "{student.epochs: [1, fast]}",
            "each",
            r"run student.epochs=fast of the sweep is not valid:\n  - `student.epochs` = 'fast'",
        ),
        ("{student.epoch: [1]}", "each", r"unknown key `student.epoch`; did you mean `epochs`"),
        ("{student.epochs.deep: [1]}", "each", r"`epochs` holds 2, which has no keys"),
        ("{name: [a, b]}", "each", "`name` changes nothing that is measured"),
        ("{student.epochs: []}", "each", "has no values to take"),
        ("{student.epochs: 3}", "each", r"fields.student.epochs` = 3: Input should be a valid (list|array)"),
        ("{student.epochs: [1, 2], members: [3]}", "zip", "the lists must be as long"),
        ("{}", "each", "at least 1"),
        ("{student.epochs: [1]}", "all", "Input should be 'each', 'product' or 'zip'"),
        ("{members: [1, 2]}", "each", r"run members=1 of the sweep(.|\n)*needs members ≥ 2, not 1"),
    ],
)
def test_what_does_not_fit_is_named_with_its_run(sweep_file, fields, vary, message):
    with pytest.raises(RecipeError, match=message):
        load_sweep(sweep_file(fields, vary))


def test_many_wrong_runs_are_counted_not_all_listed(sweep_file):
    with pytest.raises(RecipeError, match="and 3 more runs"):
        load_sweep(sweep_file("{student.epochs: [a, b, c, d, e, f, g, h]}"))


def test_a_sweep_is_not_one_run_and_one_run_is_no_sweep(sweep_file, tiny_recipe):
    path = sweep_file(TWO)
    assert is_sweep(path) and not is_sweep(tiny_recipe) and is_sweep("digits-sweep")
    with pytest.raises(RecipeError, match="is a sweep: it stands for several runs"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="has no `sweep:` block"):
        load_sweep(tiny_recipe)
