"""The options of each front end, and the errors for those that it does not have."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hvd_gqsgd.checks import check_choice, unknown_option
from hvd_gqsgd.option_types import Exchange
from hvd_gqsgd.options import OF_AUTO, OF_FEEDBACK, OPTIONS, Options

__all__ = ["FrontEnd", "names_missing"]

Function = TypeVar("Function", bound=Callable[..., Any])


def names_missing(given: Mapping[str, Any], remedy: str) -> str:
    """The message for error feedback without the names of parameters.

    Args:
        given: the keywords of the user.
        remedy: the text to pass.
    """
    name = "error_feedback" if given.get("error_feedback") is not None else "select"
    return (
        f"{name}={given[name]!r} keeps a part of the gradient of each parameter, by its name, and "
        f"named_parameters is missing: pass {remedy}, or leave {name} out"
    )


@dataclass(frozen=True)
class FrontEnd:
    """A function or class with ``**options``, and the options that have no effect there."""

    name: str
    """The name at the beginning of error messages."""
    own: tuple[str, ...] = ()
    """Other keywords of the function, which an error may suggest for an unknown keyword."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Names without an effect here, each with the reason and the remedy."""
    exchanges: tuple[Exchange, ...] = ()
    """Exchanges of this front end in addition to those of all front ends."""
    trains: bool = False
    """Whether its calls are steps of a training, which ``bits="auto"`` measures."""
    knows_parameters: bool = False
    """Whether it gets the gradients of parameters one by one, by name. Where ``named_parameters``
    is among ``without``, it goes with error feedback alone, which needs it."""

    def options(self, given: Mapping[str, Any]) -> Options:
        """Returns the options of a call.

        Raises:
            TypeError: an option is unknown, has no effect here, or has the wrong type.
            ValueError: an option is out of range, or does not go with another one.
        """
        given = self._without_names(given)
        for name, value in given.items():
            if name in OF_AUTO and value is not None and not self.trains:
                raise TypeError(
                    f"{self.name} takes no option {name!r}: it goes with bits='auto', which "
                    "measures the steps of a training"
                )
            if name in self.without:
                raise TypeError(f"{self.name} takes no option {name!r}: {self.without[name]}")
            if name not in OPTIONS:
                raise TypeError(self._unknown(name))
        if given.get("bits") == "auto" and not self.trains:
            raise ValueError(
                f"bits='auto' measures the steps of a training, and {self.name} is none: pass a "
                "number of bits, or use GlobalQSGD or DDPState"
            )
        asked = given.get("exchange", "auto")
        accepted = ("auto", "allreduce", "two_phase", *self.exchanges)
        if asked != "reduce_scatter":
            check_choice("exchange", asked, accepted)
        options = Options(**given)
        if options.exchange not in accepted:
            raise ValueError(
                "exchange='reduce_scatter' is for hvd_gqsgd.allreduce on an mpi4py communicator; "
                f"take exchange='two_phase' for {self.name}"
            )
        return options

    def _without_names(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords without ``named_parameters`` where these go with error feedback alone.

        Raises:
            ValueError: error feedback is not possible here, or has no names.
        """
        rest = dict(given)
        if not self.knows_parameters:
            self._refuse_feedback(given)
            return rest
        if given.get("error_feedback") is None and given.get("select") != "leader":
            return rest
        if "named_parameters" in self.without and rest.pop("named_parameters", None) is None:
            raise ValueError(names_missing(given, "named_parameters=model.named_parameters()"))
        return rest

    def _refuse_feedback(self, given: Mapping[str, Any]) -> None:
        """Checks that no option asks for error feedback.

        Raises:
            ValueError: one does.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(Options)}
        found = [
            f"{name}={value!r}"
            for name, value in given.items()
            if (name in OF_FEEDBACK and value != defaults[name])
            or (name, value) == ("select", "leader")
        ]
        if found:
            raise ValueError(
                f"{self.name} takes no error feedback, as it does not get the gradients of "
                f"parameters one by one: leave {' and '.join(found)} out, or use "
                "GlobalQSGD(named_parameters=...) with Horovod or DDP"
            )

    def documented(self, function: Function) -> Function:
        """Replaces ``**options`` in the signature of a function by the options."""
        signature = inspect.signature(function)
        shown = list(signature.parameters.values())[:-1]
        shown += [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type
            )
            for f in dataclasses.fields(Options)
            if f.name not in self.without
            and f.name not in signature.parameters
            and not (f.name in OF_AUTO and not self.trains)
            and not (f.name in OF_FEEDBACK and not self.knows_parameters)
        ]
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    def _unknown(self, name: str) -> str:
        without = (*self.without, *(() if self.knows_parameters else OF_FEEDBACK))
        known = [option for option in OPTIONS if option not in without]
        return unknown_option(self.name, name, [*known, *self.own])
