"""``bits="auto"`` on one rank: measures steps, tells the other ranks, and takes the arm that all
ranks take.

When enough steps were measured that the arm may change, one small message goes around, a Max. It
carries the times of these steps, and is read when the next step begins, so that no rank waits for
it in between. All ranks see the same numbers at the same step. The message shows whether a rank has
left by ``hvd.join()``; nothing is decided in the meantime. A rank that comes back has missed steps,
so all ranks send a message in the first step after that.

The first step of a session is uncompressed on all ranks, and a second message carries the state:
ranks that join later, or that have loaded no checkpoint, adopt that of the rank that is furthest.
So are the next ones, until all ranks have taken part in one: ``hvd.join()`` may keep a rank away.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hvd_gqsgd.auto.arms import Arm, arms_of, different
from hvd_gqsgd.auto.checkpoint import checked_state, no_state
from hvd_gqsgd.auto.chooser import Chooser, Decision
from hvd_gqsgd.auto.message import Heard, message_of, states_message
from hvd_gqsgd.auto.prediction import predict
from hvd_gqsgd.auto.seen import Seen
from hvd_gqsgd.auto.stopwatch import StoppedWatch, Stopwatch
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.nodes import Nodes, host_number, nodes_of_hosts
from hvd_gqsgd.option_differences import DIGESTS, apart, digests, message
from hvd_gqsgd.options import Options
from hvd_gqsgd.plan import SETTING_NAMES as NAMES
from hvd_gqsgd.plan import Plan
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.tools.cost_model import Gradients
from hvd_gqsgd.tools.node_model import Cluster
from hvd_gqsgd.transports.base import Handle, Transport

__all__ = ["Conductor"]

_log = logging.getLogger("hvd_gqsgd")


class Conductor:
    """Begins the steps of a compressor with ``bits="auto"``.

    Args:
        options: those of the user.
        stats: counts steps and decisions.
        patience: seconds to wait for the message of a rank that is in another step.

    Raises:
        ValueError: the plan has a setting that is not possible with the other options.
    """

    def __init__(self, options: Options, stats: Stats, patience: float) -> None:
        self._options = options
        self._stats = stats
        self._patience = patience
        self.coming = 0
        """The number of the next step."""
        self._pinned = None if options.plan is None else Plan(options.plan)
        self._check_plan(arms_of(dataclasses.replace(options, error=None), 1), "")
        self._plan = Plan()
        self._words: list[int] = []  # a loaded state, until the ranks are known
        self._ranks = self._known_for = 0  # of the session, and of the state
        self.catch_up: Callable[[bool], None] = _nothing
        """Calls ``go_on`` for steps that a front end has begun; with True, it begins no more."""
        self.label = "gqsgd-auto"
        """Begins the names of messages; of its own where several compressors share a transport."""
        self._start()

    def _start(self) -> None:
        self.session: object = None
        """The session of the transport that the latest step was begun in."""
        self._watch = Stopwatch() if self._pinned is None else StoppedWatch()
        self.passed = self._watch.passed
        """Gradients of a step without compression were handed in, on the host."""
        self.leave = self._watch.leave
        """The front end gives control back to the backward pass."""
        self.result = self._watch.result
        """A mean is ready."""
        self._times: list[tuple[int, int, int]] = []  # of steps that no message has told of
        self._due = 0  # the step of the next message
        self._absences: int | None = 0
        self._message: Handle | None = None
        self._state_message: Handle | None = None
        self._met = False  # whether all ranks have taken part in a step of the session
        self._arms: dict[str, Arm] = {}
        self._cluster = Cluster(1, 1)
        self._chooser: Chooser | None = None
        self._taken = 0  # the arm of the step before
        self.arm = Arm("", arms_of(self._options, 1)[0].setting, None)
        self._new_load()

    def _new_load(self) -> None:
        self._numel = [0, 0]
        self._tensors = [0, 0]
        self._on_gpu = False

    def begin(self, transport: Transport, ranks: int | None = None) -> Arm:
        """Begins a step, and returns its arm.

        All ranks must call this once a step. Ranks that are alone exchange nothing.

        Args:
            transport: the ranks that take one arm.
            ranks: how many of them exchange gradients with each other; None: all.

        Raises:
            AgreementError: other ranks have not begun the step before.
            ValueError: the plan has a setting that is not possible with so many ranks.
            Exception: an error of the transport.
        """
        self.catch_up(True)
        same = transport.session is self.session and transport.absences == self._absences
        if same and self.free:
            self.go_on()
            return self.arm
        times = self._watch.begin_step()
        if times is not None:
            # The host only enqueues the work of a GPU.
            self._times.append((times[2],) * 3 if self._on_gpu else times)
        if transport.session is not self.session:
            self._enter(transport, ranks or transport.size)
        elif self._message is not None:
            self._hear(transport)
        known = self._met or transport.size == 1  # the number of this step, on all ranks
        if transport.absences != self._absences:
            self._absences, self._due, known = transport.absences, self.coming, False
            self._times.clear()
        if self.coming >= self._due or self._absences is None:
            self._tell(transport)
        self._new_load()
        assert self._chooser is not None
        name = NAMES[self._chooser.arm]
        if self._pinned is not None:
            name = self._pinned.at(self.coming) if known else NAMES[0]
        self._plan.add(self.coming, name)
        self.arm = self._arms[name]
        self._taken = NAMES.index(name)
        self._count_step()
        return self.arm

    @property
    def free(self) -> int:
        """How many steps may begin by ``go_on``, while no rank comes or goes."""
        if self._message is not None or self._on_gpu or self._pinned is not None:
            return 0
        return max(self._due - self.coming, 0)

    def go_on(self, began: float | None = None) -> None:
        """Begins a step as the one before.

        Args:
            began: when it began, as ``time.perf_counter``; None: now.
        """
        times = self._watch.begin_step(began)
        if times is not None:
            self._times.append(times)
        self._new_load()
        self._count_step()

    def _count_step(self) -> None:
        self._stats.setting = self.arm.name  # each time, as counts may have been set to zero
        self._stats.steps += self.arm.options is None  # else its exchange counts
        self.coming += 1

    @property
    def timed(self) -> bool:
        """Whether clocks are read."""
        return self._pinned is None

    @property
    def chosen(self) -> str:
        """The setting that was measured to be the fastest; another one may be tried."""
        return self.arm.name if self._chooser is None else NAMES[self._chooser.best]

    @property
    def settled(self) -> bool:
        """Whether no setting is being tried, or measured for the first time."""
        if self._chooser is None:
            return False
        return self._ranks == 1 or self._pinned is not None or self._chooser.settled

    def leave_out(self, seconds: float) -> None:
        """Leaves a pause since the last mean out of the time from step to step."""
        self.catch_up(False)
        self._watch.leave_out(seconds)

    @property
    def current(self) -> int:
        """The number of the step that was begun last."""
        return self.coming - 1

    def count(self, numel: int, tensors: int = 1) -> None:
        """Gradients of this step that an arm may compress, beside those of ``enter``."""
        self._numel[0] += numel
        self._tensors[0] += tensors

    def count_small(self, numel: int, tensors: int = 1) -> None:
        """Gradients are handed in that no arm compresses, in this step or before the next one."""
        self._numel[1] += numel
        self._tensors[1] += tensors

    def enter(self, numel: int, on_gpu: bool = False) -> None:
        """A gradient is handed in."""
        self.count(numel)
        self._on_gpu |= on_gpu
        self._watch.enter()

    def state_dict(self) -> dict[str, Any]:
        """The number of the coming step, the measured times, and the plan so far."""
        self.catch_up(False)
        return {
            "step": self.coming,
            "schedule": {"ranks": self._ranks, "words": self._state(), "plan": self._plan.pairs()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state: the coming step is the first of a session.

        Raises:
            TypeError, ValueError: it is not a result of ``state_dict``.
        """
        self.catch_up(True)
        self.coming, self._ranks, self._words, self._plan = checked_state(state)
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have the state, and none of what is in flight."""
        self.catch_up(False)
        kept = ("_options", "_stats", "_patience", "coming", "_pinned", "_plan", "_ranks", "label")
        return {name: getattr(self, name) for name in kept} | {"_words": self._state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.catch_up = _nothing
        self._start()

    def _state(self) -> list[int]:
        if self._chooser is not None:
            return self._chooser.state()
        return list(self._words) or no_state()

    def _enter(self, transport: Transport, ranks: int) -> None:
        """Begins a session: other ranks may have a state, and this one may have none."""
        self._words, self._known_for = self._state(), self._ranks
        self.session, self._ranks = transport.session, ranks
        self._find_arms(transport.nodes)
        self._chooser = self._adopted(self._words, self._known_for)
        self._chooser.begin_uncompressed()
        self._times.clear()
        self._due, self._absences = self.coming, transport.absences
        self._message = self._state_message = None
        self._met = False

    def _find_arms(self, nodes: Nodes | None) -> None:
        """The arms among the ranks of the session; None: their nodes are not known yet."""
        arms = arms_of(self._options, self._ranks, nodes)
        self._check_plan(arms, f" on {self._ranks} ranks")
        self._arms = {arm.name: arm for arm in arms}
        of_node = nodes.shards if nodes is not None and nodes.pays else 1
        self._cluster = Cluster(self._ranks // of_node, of_node)

    def _check_plan(self, arms: Sequence[Arm], where: str) -> None:
        """Checks that a pinned plan has no other settings than those of ``arms``.

        Raises:
            ValueError: it has.
        """
        accepted = [arm.name for arm in arms]
        for step, name in self._pinned.pairs() if self._pinned is not None else ():
            if name not in accepted:
                raise ValueError(
                    f"plan must have settings that are possible with the other options{where}: "
                    f"{', '.join(map(repr, accepted))}; got {name!r} at step {step}. Give the "
                    "options of the run that the plan is of"
                )

    def _adopted(self, words: list[int], ranks: int) -> Chooser:
        allowed = [NAMES.index(arm.name) for arm in different([*self._arms.values()])]
        chooser = Chooser(len(NAMES), self._predict, allowed)
        chooser.adopt(words)
        if ranks != self._ranks:
            chooser.forget()
        return chooser

    def _tell(self, transport: Transport) -> None:
        """Starts the messages of this step.

        They go before the gradients: one that is in flight when a rank calls ``hvd.join()`` would
        never be done.
        """
        times, self._times = self._times, []
        if transport.size == 1:
            return
        load = (*self._numel, *self._tensors)
        message = message_of(self.coming, self._taken, load, times)
        self._message = transport.max_async(message, f"{self.label}.step")
        if not self._met:
            own = [self.coming, host_number(), self._known_for, *digests(self._options)]
            state = states_message(transport.rank, transport.size, [*own, *self._words])
            self._state_message = transport.sum_async(state, f"{self.label}.state")

    def _received(self, transport: Transport, message: Handle) -> Tensor:
        """The result of a message of the step before."""
        began = time.monotonic()
        while not message.done():
            waited = time.monotonic() - began
            if waited > self._patience:
                raise AgreementError(
                    f"other ranks have not begun step {self.current} of bits='auto' after "
                    f"{self._patience:g} s: all ranks must exchange as many gradients, and load "
                    "the same state"
                )
            transport.idle(waited)
        return message.wait()

    def _adopt(self, rows: list[list[int]], transport: Transport) -> None:
        """Takes over the state of the rank that is furthest, one row for each rank.

        Raises:
            AgreementError: ranks have different options.
        """
        columns = zip(*(row[3 : 3 + DIGESTS] for row in rows), strict=True)
        same = [len({*column}) == 1 for column in columns]
        if not all(same):
            self.session = None  # compare again, if the program goes on
            raise AgreementError(message(self._options, apart(self._options, same)))
        step, _, known_for, *words = max(rows, key=lambda row: row[0])
        words = words[DIGESTS : DIGESTS + len(self._words)]
        self._find_arms(transport.nodes or nodes_of_hosts(tuple(row[1] for row in rows)))
        self._chooser = self._adopted(words, known_for)
        self.coming = step + 1

    def _hear(self, transport: Transport) -> None:
        """Reads the messages of the step before, and finds out when the next one is due."""
        message, self._message = self._message, None
        state, self._state_message = self._state_message, None
        assert message is not None and self._chooser is not None
        heard = Heard.of(self._received(transport, message))
        before = self._chooser, self._chooser.arm
        if state is not None:
            states = self._received(transport, state)
            self._met = heard.all_here
            if self._met:
                self._adopt(states.view(transport.size, -1).tolist(), transport)
        elif heard.all_here:  # else the others keep the arm that ranks come back with
            self.coming += heard.step - self.current
            self._load = heard.load
            if heard.alike:
                self._learn(heard, transport.rank)
            else:
                self._chooser.restart()  # ranks have come back
        if (self._chooser, self._chooser.arm) != before:
            self._times.clear()  # of another arm
        self._due = self.coming
        if self._met:
            self._due += self._chooser.needs - len(self._times)

    def _learn(self, heard: Heard, rank: int) -> None:
        assert self._chooser is not None
        for seen in heard.steps:
            if heard.arm != self._chooser.arm:
                return
            decision = self._chooser.learn(seen)
            if decision is not None:
                self._tell_user(decision, rank)

    def _predict(self, arm: int, seen: Seen) -> list[int]:
        numel, small_numel, tensors, small = self._load
        gradients = Gradients(numel + small_numel, tensors + small, small_numel, small)
        settings = [arm.setting for arm in self._arms.values()]
        current = self._arms[NAMES[arm]].setting
        times = predict(settings, current, seen.busy, seen.held, gradients, self._cluster)
        of_name = dict(zip(self._arms, times, strict=True))
        return [of_name.get(name, seen.busy * 1000) for name in NAMES]

    def _tell_user(self, decision: Decision, rank: int) -> None:
        self._stats.decisions += 1
        if rank == 0:
            before, after = decision.before, decision.after
            _log.info(
                "step %d: %s: exchange %s -> %s of a step of %s",
                self.coming, NAMES[decision.arm], _ms(before.held), _ms(after.held),
                _ms(before.period),
            )  # fmt: skip


def _ms(micros: int) -> str:
    return f"{micros / 1e3:.{0 if micros >= 10_000 else 1}f} ms"


def _nothing(last: bool) -> None:
    """No front end begins steps."""
