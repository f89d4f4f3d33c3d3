"""When ``single`` begins its passes, and what it tells the control of their times; no clock of the machine counts."""

from types import SimpleNamespace

import pytest

from specstream_mlx import stream_generate
from specstream_mlx.drafters.scripted import Scripted
from specstream_mlx.engine import single
from specstream_mlx.engine.session import Session
from specstream_mlx.planning.control import Control, LearnedCosts
from specstream_mlx.target.tree import DraftTree
from tests.drafter_cases import DRAFTERS, drafter_of
from tests.tiny import NumberTokenizer, make_model, plain_tokens, random_prompt

SECONDS = {False: 0.001, True: 0.003}  # of a plain and of a drafted pass


class Watch:
    """A clock that the passes and the caller move, and what happened."""

    def __init__(self, monkeypatch):
        self.now, self.events, self.told, self.observed = 0.0, [], [], []
        verify, outcome, observe = Session.verify, Session.outcome, Control.observe

        def watched_verify(session, draft, remaining):
            self.events.append("begun")
            return verify(session, draft, remaining)

        def watched_outcome(session, passed, drawn):
            self.now += SECONDS[passed.draft.tree.size > 1]
            return outcome(session, passed, drawn)

        def watched_observe(control, drafted, tree, seconds):
            self.observed.append((drafted, seconds))
            observe(control, drafted, tree, seconds)

        monkeypatch.setattr(Session, "verify", watched_verify)
        monkeypatch.setattr(Session, "outcome", watched_outcome)
        monkeypatch.setattr(Control, "observe", watched_observe)
        monkeypatch.setattr(single, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def spend(self, responses, seconds):
        """Ask for every response, and stay away so long after each."""
        for response in responses:
            self.told.append(len(self.events))
            self.events.append("told")
            self.now += seconds
            yield response


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.fixture(scope="module")
def model():
    return make_model("llama", seed=61)


@pytest.mark.parametrize("away", [0.0, 0.00005, 1.0])
def test_auto_learns_what_passes_cost_however_long_the_caller_is_away(watch, model, away):
    """Red when: a time holds what the caller did, or nothing is learned beside a caller who is busy."""
    prompt = random_prompt(6, seed=1)
    text = plain_tokens(model.base, prompt, 160, end_of_text=())
    drafter = Scripted(text, len(prompt), 1.0)
    drafter.name = f"scripted {away}"  # with times of its own
    responses = stream_generate(model, NumberTokenizer(end_of_text=()), prompt, 160, drafter=drafter)
    list(watch.spend(responses, away))
    times = model.pass_times(drafter.name)
    assert min(len(times.plain), len(times.of(DraftTree.chain(4), "deferred"))) >= LearnedCosts.ENOUGH
    most = away if away < 0.1 * SECONDS[False] else 0.0  # a caller who is hardly away at all is not told from a pass
    for drafted, seconds in watch.observed:
        assert SECONDS[drafted] - 1e-9 <= seconds <= SECONDS[drafted] + most + 1e-9
    ahead = [watch.events[:index].count("begun") - number for number, index in enumerate(watch.told, start=1)]
    assert ahead[0] == 0
    assert (max(ahead[3:20]) > 0) is (away < 1.0), "beside a busy caller passes are timed one by one"
    assert min(ahead[-8:-3]) > 0, "and begun ahead once their costs are known"


@pytest.mark.parametrize("draft", ["off", "chain", "tree", "auto"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_nothing_is_begun_before_the_first_token_is_told(watch, model, name, draft):
    """Red when: the first token waits for a draft, or for the pass after it."""
    prompt = random_prompt(4, seed=2) * 2
    text = plain_tokens(model.base, prompt, 12, end_of_text=())
    drafter = drafter_of(name, model, text, len(prompt))
    proposed = []
    state_of = drafter.begin

    class Begun:
        """The drafter, noting when it is asked."""

        def __getattr__(self, attribute):
            return getattr(drafter, attribute)

        def begin(self, target, ids):
            state = state_of(target, ids)
            propose = state.propose
            state.propose = lambda *asked: (proposed.append(len(watch.events)), propose(*asked))[1]
            return state

    responses = stream_generate(model, NumberTokenizer(end_of_text=()), prompt, 12, draft=draft, drafter=Begun())
    tokens = [token for response in watch.spend(responses, 0.0) for token in response.tokens]
    assert tokens == text
    assert watch.events[:2] == ["begun", "told"]
    assert draft == "off" or min(proposed) == 2
