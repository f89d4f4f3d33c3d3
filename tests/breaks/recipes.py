"""Breaks of the recipes and benchmarks."""

from tests.breaks import Break

BREAKS = (
    Break(
        "a grown model's final norm forgets the repeated units",
        "benchmarks/tasks/text_to_sql/grow.py",
        "weight.repeat(settings.width) / settings.width)",
        "weight.repeat(settings.width))",
        "tests/test_grown_recipe.py::computes_what_the_small_one_computes",
    ),
    Break(
        "copies of a unit in a grown model stay copies for ever",
        "benchmarks/tasks/text_to_sql/grow.py",
        "cancelling = drawn - drawn.mean(dim=1, keepdim=True)",
        "cancelling = 0 * drawn",
        "tests/test_grown_recipe.py::can_learn_on_its_own",
    ),
    Break(
        "training from a given model starts from nothing",
        "benchmarks/tasks/text_to_sql/pretrain.py",
        "LlamaForCausalLM.from_pretrained(start, attn_implementation=ATTENTION)",
        "LlamaForCausalLM(LlamaConfig.from_pretrained(start))",
        "tests/test_grown_recipe.py::goes_on_from_the_model_it_is_given",
    ),
    Break(
        "rescoring looks up pairs beyond the newest token",
        "benchmarks/rescoring.py",
        "place <= newest[:, None, None]",
        "place <= newest[:, None, None] + 1",
        "tests/training/test_rescoring.py::test_what_the_text_has_seen_and_what_training_does_with_it",
    ),
)
