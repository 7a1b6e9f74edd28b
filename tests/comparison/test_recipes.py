from pathlib import Path

from mechsub.comparison.recipes import tabulate_recipes
from mechsub.comparison.runs import ComparedRun

PLAIN = {"init": "same", "sham": False}


def run(name, conditions, **recipe):
    whole = {"name": name, "members": 3, "conditions": conditions, **recipe}
    return ComparedRun(name, Path(name), {"versions": {"mechsub": "1"}}, whole, {}, {}, ())


def test_the_table_holds_what_differs_and_nothing_else():
    first = run("a", {"x": PLAIN}, student={"optimizer": {"learning_rate": 0.1}, "epochs": 3})
    second = run("b", {"x": {**PLAIN, "sham": True}}, student={"optimizer": {"learning_rate": 0.2}, "epochs": 3})
    table = tabulate_recipes([first, second])
    assert (table.columns, table.fields, table.values) == (["a", "b"], ["student.optimizer.learning_rate"], [["0.1", "0.2"]])


def test_conditions_that_only_one_run_has_and_those_that_differ_are_rows():
    first, second = run("a", {"x": PLAIN}), run("b", {"x": {**PLAIN, "init": "different"}, "y": PLAIN})
    table = tabulate_recipes([first, second])
    assert dict(zip(table.fields, table.values, strict=True)) == {
        "condition.x.init": ["same", "different"],
        "condition.y": ["–", "init: same"],
    }


def test_a_third_run_that_differs_alone_has_its_row():
    runs = [run("a", {"x": PLAIN}), run("b", {"x": PLAIN}), run("c", {"x": PLAIN}, seed=1)]
    assert tabulate_recipes(runs).values == [["–", "–", "1"]]


def test_conditions_of_a_single_run_are_the_columns():
    table = tabulate_recipes([run("a", {"x": PLAIN, "y": {**PLAIN, "init": "different"}})])
    assert (table.columns, table.fields, table.values) == (["x", "y"], ["init"], [["same", "different"]])
