"""Guessers on invented routes, what is read of their guesses, and that outputs stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import make_tiny
from test_rehearse import passes, same

from streamer import run as command
from streamer.counters import Tally
from streamer.errors import StreamerError, UsageError
from streamer.foresee import SHARE, Foresight, _Likely
from streamer.guess import MEMORY, SOURCES, Frequency, Guess, Moment, Previous, Router, Token
from streamer.loading import expert_count, load_streamed
from streamer.lrfu import Lrfu
from streamer.store import Store


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def named(guesser: Any, moment: Moment) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for layer, expert, strength in guesser.guess(moment):
        assert 0 <= strength <= 1
        found.setdefault(layer, set()).add(expert)
    return found


@pytest.mark.smoke
def test_a_token_is_remembered_by_what_it_chose_more_than_once() -> None:
    token = Token(layers=2, top_k=2)
    token.observe(1, tokens(7), np.array([[4, 5]]))
    assert not named(token, Moment(tokens(7)))
    for chosen in ([4, 5], [4, 5], [4, 9]):
        token.observe(1, tokens(7), np.array([chosen]))
    strengths = {e: s for _, e, s in token.guess(Moment(tokens(7)))}
    assert set(strengths) == {4, 5} and strengths[4] > strengths[5]
    assert not named(token, Moment(tokens(8))) and not named(token, Moment(tokens(7), at=0))
    for _ in range(3):
        token.observe(1, tokens(7), np.array([[1, 2]]))
    assert named(token, Moment(tokens(7)))[1] == {1, 2}


@pytest.mark.smoke
def test_rows_of_a_pass_are_guessed_together_and_places_are_bounded() -> None:
    token = Token(layers=3, top_k=2)
    for _ in range(2):
        token.observe(0, tokens(1, 2), np.array([[0, 1], [2, 3]]))
    assert named(token, Moment(tokens(1, 2, 5))) == {0: {0, 1, 2, 3}}
    token.observe(0, tokens(1 + token._places), np.array([[8, 9]]))  # takes the place of 1
    assert named(token, Moment(tokens(1))) == {}
    large = Token(layers=94, top_k=8)
    assert large._known.nbytes + large._whose.nbytes <= MEMORY


@pytest.mark.smoke
def test_the_row_before_and_the_most_used() -> None:
    previous, frequency = Previous(2), Frequency([10, 10], 1)
    for ids in ([[1], [2]], [[3], [2]]):
        for one in (previous, frequency):
            one.observe(0, tokens(5, 6), np.array(ids))
    assert named(previous, Moment(tokens(9))) == {0: {2}}
    strengths = {e: s for _, e, s in frequency.guess(Moment(tokens(9)))}
    assert strengths == {2: 0.5, 1: 0.25}


@pytest.mark.smoke
@pytest.mark.parametrize("width", [16, 2048])  # gates held as floats, and asked
def test_the_next_router_is_asked_with_the_norm_of_its_own_layer(width: int) -> None:
    gates = [nn.Linear(width, 12, bias=False) for _ in range(3)]
    norms = [mx.random.uniform(0.5, 2, (width,)) for _ in range(3)]
    router = Router(gates, norms, top_k=3)
    stream = mx.random.normal((2, width))
    given = np.array(mx.fast.rms_norm(stream, norms[1], 1e-6))
    logits = np.array(gates[2](mx.fast.rms_norm(stream, norms[2], 1e-6)))
    want = set(np.argsort(-logits, axis=-1)[:, :3].reshape(-1).tolist())
    assert named(router, Moment(tokens(0, 0), 1, given)) == {2: want}
    assert not named(router, Moment(tokens(0, 0), 2, given))
    assert not named(router, Moment(tokens(0, 0), 1)) and not named(router, Moment(tokens(0, 0)))


class _Named:
    """A guesser that says what it is told to."""

    learns = True

    def __init__(self, *guesses: Guess):
        self.guesses = guesses

    def observe(self, *_: Any) -> None:
        return

    def guess(self, moment: Moment) -> Any:
        return self.guesses if moment.at < 0 else ()


class _Run:
    """A residency that notes what is read ahead."""

    def __init__(self, slots: int = 64):
        self.pool = Lrfu(slots, [40, 40])
        self.ahead = SimpleNamespace(held=0, reads=lambda layer, expert: False)
        self.pace, self.counters = SimpleNamespace(best=1.0), SimpleNamespace(bytes_wanted=0)
        self.asked: list[tuple[int, list[int]]] = []

    def prefetch(self, layer: int, experts: list[int], *_: Any) -> None:
        self.asked.append((layer, experts))


def begun(run: _Run, source: Any, passes: int, chosen: list[int]) -> tuple[Foresight, Tally]:
    """Passes of one token whose layer 1 chooses so."""
    tallies: dict[str, Tally] = {}
    sight = Foresight(run, tallies)  # type: ignore[arg-type]
    sight.use({"it": source})
    for _ in range(passes):
        run.asked.clear()
        sight.begin(tokens(3), guess=True, rehearse=False)
        sight.chose(1, np.array([[chosen]]), chosen, None)
        sight.end()
    return sight, tallies["it"]


@pytest.mark.smoke
def test_what_comes_true_is_read_and_what_does_not_is_no_more() -> None:
    run = _Run()
    source = _Named(Guess(1, 5, 0.3), Guess(1, 6, 0.9))
    _, tally = begun(run, source, 1, [5, 7])
    assert run.asked == [(1, [6])]  # by their own idea of it, at first
    assert (tally.misses, tally.named, tally.right, tally.read, tally.used) == (2, 2, 1, 1, 0)
    _, tally = begun(run, source, 60, [5, 7])
    assert run.asked == [(1, [5])]
    assert tally.recall == 0.5 and tally.precision == 0.5 and 0 < tally.used < tally.read


@pytest.mark.smoke
def test_a_busy_disk_is_left_alone() -> None:
    run = _Run()
    sight, _ = begun(run, _Named(Guess(1, 6, 0.8)), 1, [6])
    assert run.asked
    for busy, reads in ((0.97, False), (0.9, True)):  # of what is right in five of six
        run.asked.clear()
        sight.busy.value, sight._at = busy, 0.0  # and the pass before was long ago
        sight.begin(tokens(3), guess=True, rehearse=False)
        assert bool(run.asked) == reads
        sight.end()


@pytest.mark.smoke
def test_guesses_hold_a_part_of_the_slots_and_name_nothing_that_is_there() -> None:
    run = _Run(slots=16)
    run.pool.place(1, 4, *run.pool.take(1))
    _, tally = begun(run, _Named(*(Guess(1, e, 0.9) for e in range(10))), 1, [4])
    assert run.asked == [(1, [0, 1])] and 16 // SHARE == 2
    assert tally.named == 9


def test_guesses_change_no_bit_and_are_counted(tmp_path: Path) -> None:
    path = make_tiny("qwen3_5_moe", tmp_path)
    expected = passes(load_streamed(path))
    for executor in ("layerwise", "lookahead"):
        for guess in (*SOURCES, ",".join(SOURCES)):
            slots = expert_count(path) // 2
            model: Any = load_streamed(path, slots=slots, executor=executor, guess=guess)  # type: ignore[arg-type]
            for _ in range(3):
                assert same(expected, passes(model))
            stats = model.streamer.counters.prefetch(1)
            assert set(guess.split(",")) <= set(stats)
            for name in guess.split(","):
                tally = model.streamer.counters.sources[name]
                assert 0 <= tally.used <= tally.right <= tally.named and tally.misses
                assert tally.used <= tally.read <= tally.named
            run = model.streamer.executors[0]
            run.ahead.drop(wait=True)
            resident = sum(int((table >= 0).sum()) for table in run.pool.slot_of)
            assert resident + len(run.pool.free) == run.pool.slots
    assert model.streamer.counters.sources["token"].read > 0


def test_what_demands_took_is_told_apart_by_guesses_under_way(tmp_path: Path) -> None:
    path = make_tiny("qwen3_5_moe", tmp_path)
    model: Any = load_streamed(path, slots=expert_count(path) // 3)
    passes(model)
    counters = model.streamer.counters
    assert counters.alone.calls and not counters.beside.calls
    assert 0 < counters.alone.nbytes <= counters.bytes_wanted and counters.alone.seconds > 0


def test_a_failed_read_of_a_guess_leaves_a_usable_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny("qwen3_5_moe", tmp_path)
    expected = passes(load_streamed(path))
    model: Any = load_streamed(path, slots=expert_count(path) // 2, guess="token")
    passes(model)
    true = Store.read

    def broken(self: Store, pieces: Any, guess: Any = None, widen: Any = ()) -> Any:
        if guess is not None:
            raise StreamerError("the disk is gone")
        return true(self, pieces, guess, widen)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", broken)
        with pytest.raises(StreamerError, match="disk is gone"):
            for _ in range(3):
                passes(model)
    assert same(expected, passes(model))


@pytest.mark.smoke
def test_a_guesser_that_there_is_not_is_refused(tmp_path: Path) -> None:
    path = make_tiny("qwen3_5_moe", tmp_path)
    with pytest.raises(UsageError, match="no guesser 'oracle'"):
        load_streamed(path, slots=expert_count(path) // 2, guess="token,oracle")


def test_the_command_line_tells_of_each_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for guess in ("off", "token,router"):
        options = ["--prompt", "def ", "--memory", "40%", "--max-tokens", "12", "--guess", guess]
        options += ["--heat", "off", "--stats", str(tmp_path / "stats")]
        assert command.main(options) == 0
        told.append((capsys.readouterr().out, json.loads((tmp_path / "stats").read_text())))
    assert told[0][0] == told[1][0]
    found = told[1][1]["prefetch"]
    for name in ("token", "router"):
        assert set(found[name]) == {"recall", "precision", "named", "bytes", "bytes_used"}
    assert found["router"]["named"] > 0 and 0 < found["router"]["recall"] <= 1
    assert found["demands"]["calls"] > 0
    assert not {"token", "router"} & set(told[0][1]["prefetch"])


@pytest.mark.parametrize("named", [1, 10, 200])
def test_what_many_guesses_came_to_is_learnt_without_their_order(named: int) -> None:
    likely = _Likely(0.5)
    for _ in range(400):
        likely.add_all(round(0.7 * named) if named > 1 else 1, named)
    assert likely.share == pytest.approx(0.7 if named > 1 else 1.0, abs=0.02)
