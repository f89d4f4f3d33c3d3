"""Breaks of train's command line, and of the adapter that a training starts from."""

from tests.breaks import Break

CLI_TRAIN = "tests/cli/test_cli_train.py::"
START = "tests/training/test_start.py::"
BREAKS = (
    Break(
        "rows are held out although nothing is validated",
        "specstream_mlx/training/run.py",
        "            features=features,\n            validation=self.settings.val_batches != 0,\n",
        "            features=features,\n",
        CLI_TRAIN + "test_without_validation_all_rows_are_trained_on",
    ),
    Break(
        "prompts are held out although nothing is validated",
        "specstream_mlx/training/run.py",
        "            split_seed=self.settings.seed,\n            validation=self.settings.val_batches != 0,\n",
        "            split_seed=self.settings.seed,\n",
        CLI_TRAIN + "test_without_validation_all_rows_are_trained_on and answers",
    ),
    Break(
        "how to answer is judged after the model was loaded",
        "cli/specstream_cli/train.py",
        "        DistillSettings(**_of_answers(given))\n",
        "",
        CLI_TRAIN + "test_numbers_are_judged_before_anything_is_loaded",
    ),
    Break(
        "an optimizer is tried out in the first step",
        "specstream_mlx/training/run.py",
        "trainer.check_optimizer(chosen)",
        "trainer.make_optimizer(chosen)",
        CLI_TRAIN + "test_numbers_are_judged_before_anything_is_loaded",
    ),
    Break(
        "LoRA of an adapter to start from goes on every layer",
        "specstream_mlx/training/run.py",
        "            run.settings = settings_with_its_lora(",
        "            settings_with_its_lora(",
        START + "goes_on_with_the_modules",
    ),
    Break(
        "a flag that contradicts an adapter's modules is swallowed",
        "specstream_mlx/training/start.py",
        "if flags and asked.keys() != modules.keys():",
        "if False:",
        START + "test_flags_that_say_what",
    ),
    Break(
        "an adapter is refused tensor by tensor",
        "specstream_mlx/training/start.py",
        "first, *others = str(error).splitlines()",
        "first, *others = (str(error),)",
        START + "cannot_go_on_with",
    ),
    Break(
        "LoRA of an embedding is dropped when training goes on",
        "specstream_mlx/training/start.py",
        "    if strange:\n",
        "    if False:\n",
        START + "cannot_go_on_with and embedding",
    ),
    Break(
        "streams alone cannot be trained further",
        "specstream_mlx/training/run.py",
        "                without.append(LORA_PREFIX)\n",
        "                pass\n",
        START + "streams_alone",
    ),
    Break(
        "num_layers hides a key that is a whole path",
        "specstream_mlx/training/trainable.py",
        "(by_name and not lossless) or ",
        "",
        START + "keys_are_paths",
    ),
    Break(
        "PEFT is told of modules that have no LoRA",
        "specstream_mlx/training/export_peft.py",
        "sorted(targets if everywhere else modules)",
        "sorted(targets)",
        START + "goes_on_with_the_modules and mixed",
    ),
    Break(
        "an output that a kill hid is trained over",
        "cli/specstream_cli/train.py",
        "            recover(place.expanduser())\n",
        "",
        CLI_TRAIN + "kill_hid",
    ),
    Break(
        "a replacement leaves what a kill hid",
        "specstream_mlx/formats/atomic.py",
        "        recover(target)\n        check()\n",
        "        check()\n",
        "tests/training/test_trainer.py::kill_left_aside",
    ),
    Break(
        "answers of one token are trained on",
        "specstream_mlx/training/run.py",
        "if not any(len(example.answer) > 1 for example in examples.train):",
        "if False:",
        CLI_TRAIN + "test_rows_that_nothing",
    ),
    Break(
        "half a character reaches the tokenizer",
        "specstream_mlx/formats/jsonl.py",
        'if "\\\\u" in line:',
        "if False:",
        CLI_TRAIN + "test_rows_that_nothing",
    ),
    Break(
        "a link to nowhere is found out after the training",
        "cli/specstream_cli/train.py",
        "    if output.is_symlink():\n",
        "    if False:\n",
        CLI_TRAIN + "test_places_that_cannot_be_written",
    ),
    Break(
        "a place is judged by its permissions alone",
        "cli/specstream_cli/train.py",
        '        Path(tempfile.mkdtemp(prefix=".specstream-", dir=parent)).rmdir()\n',
        "",
        CLI_TRAIN + "test_places_that_cannot_be_written",
    ),
    Break(
        "the prompts in a model's directory are passed over",
        "cli/specstream_cli/train.py",
        "_prompts(given) or default_prompts(run.path)",
        "_prompts(given)",
        CLI_TRAIN + "test_a_model_answers_the_prompts_in_its_directory_unless_given_others",
    ),
)
