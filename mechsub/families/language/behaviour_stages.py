"""What stages do with behaviours: the questions into the run, and the examples as what a teacher learns."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from mechsub.errors import RecipeError
from mechsub.families.language.behaviour import Behaviour, read_examples
from mechsub.families.language.chat import ChatTokenizer, Row, chat
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.layout import BEHAVIOURS_FILE
from mechsub.families.language.members import load_chats
from mechsub.families.language.training_config import TeacherConfig
from mechsub.rundir import write_json
from mechsub.stage import Task
from mechsub.streams import random_stream


def import_behaviours(tasks: Sequence[Task]) -> None:
    """Stage: the behaviours into the run, once every model can be asked their questions and answer at length."""
    for task in tasks:
        arguments = task.stage.arguments
        behaviours = [Behaviour(**given) for given in arguments["behaviours"].values()]
        questions = [question for behaviour in behaviours for question in (*behaviour.trained, *behaviour.held_out)]
        for model in arguments["models"]:
            chats = load_chats(task, model)
            for system_prompt in arguments["contexts"]:
                prompts = chats.encode_prompts([chat(question, system_prompt) for question in questions])
                longest = max(map(len, prompts))
                if longest + arguments["judged_tokens"] > chats.max_length:
                    raise RecipeError(
                        f"{chats.source}: a question of {longest} tokens and an answer of up to evaluation.judged_tokens = "
                        f"{arguments['judged_tokens']} do not fit its context of {chats.max_length}; lower judged_tokens"
                    )
        write_json(task.path(BEHAVIOURS_FILE), arguments["behaviours"])


def draw_example_rows(task: Task, model: PreTrainedModel, chats: ChatTokenizer, config: TeacherConfig) -> list[Row]:
    """The rows of a teacher's training, from the examples that show its behaviour.

    The neutral teacher is asked the prompts of all behaviours' examples and learns the reference's own answers, of at most as
    many tokens as the longest example: where there is one behaviour, the same prompts in the same order as its teacher.

    Raises:
        RecipeError: the reference answers just as the examples do, so that it is no neutral teacher.
    """
    arguments = task.stage.arguments
    seed, member = arguments["seed"], arguments["member"]
    examples = [example for path in arguments["examples"] for example in read_examples(path)]
    rows = chats.encode_rows(
        [chat(prompt, arguments["system_prompt"]) for prompt, _ in examples], [completion for _, completion in examples]
    )
    count = config.num_steps * config.batch_size
    asked = random_stream(seed, "member", member, "teacher-questions").integers(len(examples), size=count).tolist()
    if arguments["role"] == "teacher":
        return [rows[number] for number in asked]
    longest = min(max(len(row.completion) for row in rows), chats.max_length - max(len(row.prompt) for row in rows))
    draws = draw_uniforms(seed, [("member", member, "neutral-answers", number) for number in range(count)], longest)
    sampled = sample_completions(model, chats, [rows[number].prompt for number in asked], draws)
    answers = [completion.text for completion in sampled]
    if answers == [examples[number][1] for number in asked]:
        raise RecipeError(
            f"{task.stage.name}: the reference answers just as the examples do: its training would equal the teacher's, and "
            "it would be no control; choose other examples"
        )
    return chats.encode_rows([chat(examples[number][0], arguments["system_prompt"]) for number in asked], answers)
