"""``--check-exact``: an answer beside plain decoding by mlx-lm on the same weights."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from specstream_cli.terminal import to_stderr
from specstream_mlx.errors import VerificationError
from specstream_mlx.formats.prompts import prompt_ids


class ExactCheck:
    """Compares answers; a difference that rounding does not explain is raised once everything is printed."""

    def __init__(
        self,
        target: Any,
        model: str | None,
        adapter: str | None,
        options: dict[str, Any],
        revision: str | None = None,
    ) -> None:
        """``options``: sampler, logits processors, seed and prefill step, as the answers are made with."""
        from specstream_mlx.engine.exactness import plain_model

        self._target = target
        self._plain = plain_model(target, model, adapter, revision=revision)
        self._options = options
        self._num_tokens = 0
        self._failures: list[str] = []

    def compare(self, tokenizer: Any, prompt: str | list[int], tokens: Sequence[int], name: str = "") -> dict[str, Any]:
        """What ``--json`` says about one answer; a difference is also said on standard error. ``name`` goes before."""
        from specstream_mlx.engine.exactness import check_exact

        ids = prompt_ids(tokenizer, prompt, self._target.vocab_size)
        difference = check_exact(self._plain, ids, tokens, **self._options)
        self._num_tokens += len(tokens)
        if difference is None:
            return {"identical": True}
        if difference.is_tie:
            to_stderr(f"{name}{difference}: a tie")
        else:
            self._failures.append(f"{name}{difference}; please report it")
        return {"identical": False, "tie": difference.is_tie} | asdict(difference)

    def finish(self, *, quiet: bool) -> None:
        """Say how much was compared.

        Raises:
            VerificationError: an answer is not plain decoding's, and rounding does not explain it.
        """

        if self._failures:
            raise VerificationError("\n".join(self._failures))
        if not quiet:
            to_stderr(f"exact: {self._num_tokens} tokens compared with plain decoding by mlx-lm")
