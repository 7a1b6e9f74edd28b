import pytest

from mechsub.errors import RecipeError
from mechsub.recipe import dump_recipe, list_recipes, load_recipe


def test_a_resolved_recipe_replays_itself(tmp_path):
    recipe = load_recipe("digits", ["members=7", "student.optimizer.learning_rate=1e-3"])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert recipe.members == 7


def test_packaged_recipes_are_listed_and_valid():
    assert "digits" in list_recipes()


def test_a_condition_can_be_added_by_a_setting():
    recipe = load_recipe("digits", ["conditions.far={init: different, noise_std: 0.2}"])
    assert recipe.conditions["far"].noise_std == 0.2
    assert recipe.conditions["far"].init == "different"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("student.epoch=3", "unknown key `student.epoch`; did you mean `epochs`?"),
        ("student.optimizer.learning_rat=3", "did you mean `learning_rate`?"),
        ("membrs=3", "unknown key `membrs`; did you mean `members`?"),
        ("conditions.same-init.logit=aux", "did you mean `logits`?"),
        ("student.epochs=many", "`student.epochs` = 'many'"),
        ("members=0", "`members` = 0: Input should be greater than or equal to 1"),
        ("members=1", "`conditions.different-init` starts at another member's reference: it needs members ≥ 2, not 1"),
        ("teacher.optimizer.learning_rate=-1", "`teacher.optimizer.learning_rate` = -1"),
        ("teacher.optimizer.learning_rate=.inf", "finite number"),
        ("model.num_auxiliary=0", "imitates the auxiliary logits, but `model.num_auxiliary` = 0"),
        ("model.hidden_widths=[8, 0]", "at least one unit"),
        ("model.hidden_widths=[]", "at least 1 item"),
        ("conditions.same-init.init=different", "same-init means"),
        ("conditions.same-inti=", "no condition is called 'same-inti'; did you mean `same-init`?"),
        ("conditions={}", "at least 1 item"),
        ("conditions=3", "`conditions` = 3"),
        ("family=classifer", "no family is called 'classifer'; did you mean `classifier`?"),
        ("epochs", "write it as key.path=value"),
        ("members.many=3", "`members` holds 16, which has no keys"),
        ("members=[", "the value is not YAML"),
        ("members='16'", "`members` = '16': Input should be a valid integer"),
        ("members=true", "`members` = True: Input should be a valid integer"),
        ("members=2.5", "`members` = 2.5"),
        ("student.optimizer.betas=[1.5, 0.9]", "less than 1"),
        ("student.optimizer.momentum=0.9", "adam has no momentum"),
        ("data.test_fraction=0.9999", "less than or equal to 0.9"),
        ("model.num_auxiliary=1", "imitates the softmax of one auxiliary logit, which is 1 whatever the teacher says"),
        ("data.hub=ylecun/mnist", "digits come with scikit-learn and have no path or hub"),
        ("data={name: mnist, test_fraction: 0.3}", "has no test_fraction"),
        ("name=../../x", "`name` = '../../x'"),
        ("conditions.a/b={init: different}", "conditions"),
        ("model={hidden_widths: [4], hidden_widths: [5]}", "the key 'hidden_widths' stands twice"),
        ("model.hiden=3", "did you mean `hidden_widths`?"),
        ("carrier.inputs=noise", "'uniform', 'gaussian', 'images' or 'shuffled-pixels'"),
    ],
)
def test_a_wrong_recipe_says_what_and_where(setting, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", [setting])
    assert message in str(caught.value)


def test_a_rate_may_be_written_as_people_write_it():
    assert load_recipe("digits", ["student.optimizer.learning_rate=1e-3"]).student.optimizer.learning_rate == 0.001


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", ["members=0", "student.epochs=0", "typo=1"])
    assert all(name in str(caught.value) for name in ("members", "student.epochs", "typo"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "not a recipe"),
        ("a: [", "is not YAML"),
        ("name: x", "`family` is missing"),
        ("family: classifier", "`name`: Field required"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_unknown_names_and_paths_are_told_apart():
    with pytest.raises(RecipeError, match="did you mean `digits`"):
        load_recipe("digit")
    with pytest.raises(RecipeError, match="there is no recipe file nowhere/x.yaml"):
        load_recipe("nowhere/x.yaml")
