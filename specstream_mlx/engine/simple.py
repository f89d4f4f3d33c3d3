"""The whole algorithm on a page, for every drafter (method section 4); what ``single`` must equal pass by pass.

prefill -> draft -> verify -> accept -> commit -> draft ...
"""

from collections.abc import Generator, Sequence

import mlx.core as mx
from mlx_lm.generate import generation_stream

from specstream_mlx.engine.session import Outcome, Session


def passes(session: Session, prompt: Sequence[int], prefill_step_size: int = 2048) -> Generator[Outcome, None, None]:
    """One pass after another, nothing launched ahead; ends after a stop token or the last token wanted.

    The prompt's last token is the first root, so its pass is a verification pass like any other and yields the first
    token. Plain decoding is the same loop with an empty tree.
    """
    draft = session.prefill(prompt, prefill_step_size)
    while True:
        with mx.stream(generation_stream):
            passed, drawn = session.verify(draft, session.remaining)
            outcome = session.outcome(passed, drawn)
            session.commit(passed, outcome.accepted.nodes, outcome.tokens)
        session.record(outcome, drafted=draft.tree.size > 1)
        if session.ended(outcome):
            break
        yield outcome
        with mx.stream(generation_stream):
            session.choose()
            root = mx.array(outcome.tokens[-1:])
            draft = session.propose(passed, outcome.accepted.nodes[-1], root, session.remaining)
    session.finish(outcome.tokens[-1])
    yield outcome
