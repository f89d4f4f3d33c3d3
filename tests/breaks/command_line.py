"""Breaks of the program."""

from tests.breaks import Break

BREAKS = (
    Break(
        "the text behind a prompt cache begins at its beginning",
        "specstream_mlx/formats/chat_template.py",
        "return text[begin:]",
        "return text",
        "tests/cli/test_cli_cache_prompt.py::test_either_program",
    ),
    Break(
        "an answer is kept in the conversation without its question",
        "cli/specstream_cli/chat.py",
        'self.messages += [{"role": "user", "content": question}, answer_message(text)]',
        "self.messages += [answer_message(text)]",
        "tests/cli/test_cli_chat.py::test_every_answer",
    ),
    Break(
        "Ctrl-C in an answer ends the program",
        "cli/specstream_cli/chat.py",
        "            signal.signal(signal.SIGINT, note)",
        "            pass",
        "tests/cli/test_cli_chat.py::test_ctrl_c",
    ),
    Break(
        "a batch goes on from the random state of the answer before",
        "cli/specstream_cli/generate.py",
        '            "seed": seed,',
        '            "seed": None if prompts_file else seed,',
        "tests/cli/test_cli_exact_and_batch.py::test_a_batch_answers_as_single_runs_do",
    ),
    Break(
        "a difference beyond the bound is let through",
        "cli/specstream_cli/exact.py",
        "        if self._failures:",
        "        if False:",
        "tests/cli/test_cli_exact_and_batch.py::test_a_difference_is_reported_and_fails_beyond_the_bound",
    ),
    Break(
        "a key of mlx-lm's files is unknown",
        "cli/specstream_cli/train_config.py",
        '    "project_name": "no service is reported to",\n',
        "",
        "tests/cli/test_train_config.py::every_key",
    ),
    Break(
        "a training runs whose upload cannot begin",
        "cli/specstream_cli/train.py",
        "            check_upload(upload_repo)\n",
        "            pass\n",
        "tests/cli/test_train_upload.py::cannot_begin",
    ),
    Break(
        "rejected drafts are not drawn",
        "cli/specstream_cli/passes.py",
        "if parts[1] and parts not in found:",
        "if False:",
        "tests/cli/test_passes.py::test_passes_without_colour",
    ),
    Break(
        "a plan is used for another number of draft tokens",
        "specstream_mlx/models/identity.py",
        '"depth": drafter.max_depth, ',
        "",
        "tests/cli/test_cli_drafters.py::test_a_stored_plan_belongs",
    ),
)
