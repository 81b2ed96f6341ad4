"""The program that answers Flower's messages at a hospital: only the installed code runs.

Flower starts a program called ``flwr-clientapp`` for every message. As shipped, it unpacks the
bundle that the server sent and imports it. This one takes its place (``client.daemon`` puts it
first on ``PATH``) and guarantees:

- the bundle is neither unpacked nor imported nor are its dependencies installed;
- the message is answered by ``client.app:app`` as installed at this hospital;
- an exception sends no text to the server, only that an error happened here;
- if this release of Flower loads code in a way not known here, nothing runs at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from types import CodeType, ModuleType

from flwr.app import Context, Message
from flwr.cli import install
from flwr.supernode.cli import flwr_clientapp
from flwr.supernode.runtime import run_clientapp as runtime

from client.refusal import failure_site
from transport import processes

SUPPORTED = "1.41."  # minor releases of Flower change their internals
_NEVER_CALLED = {"load_app", "import_module", "exec", "eval", "__import__"}

logger = logging.getLogger("client.pinned")  # also when run as a program

Application = Callable[[Message, Context], Message]


class PinError(RuntimeError):
    """Flower cannot be held to the installed application; nothing may run."""


class ClientFailure(RuntimeError):
    """Stands for any exception of the application; its text is the same for all of them."""


def main() -> None:
    """Entry point, with the arguments of Flower's own ``flwr-clientapp``."""
    processes.log_to_stderr()
    pin()
    flwr_clientapp()


def pin(target: ModuleType = runtime, flower: str | None = None) -> None:
    """Bind Flower's message loop in ``target`` to the installed application.

    Raises
    ------
    PinError
        Flower is not the supported release (``flower``; None asks the installation), or its message
        loop does not load code through exactly the functions replaced here.
    """
    flower = flower or version("flwr")
    if not flower.startswith(SUPPORTED):
        raise PinError(f"Flower {flower} is installed, this hospital's code knows {SUPPORTED}*")
    names = _names_in(target.run_clientapp.__code__)
    missing = {name for name in _REPLACED if name not in names or not hasattr(target, name)}
    if missing or names & _NEVER_CALLED:
        odd = ", ".join(sorted(missing | names & _NEVER_CALLED))
        raise PinError(f"Flower {flower} loads applications in an unknown way ({odd})")
    for name, function in _REPLACED.items():
        setattr(target, name, function)
    # At its source too, so that no other way leads to an unpacked bundle.
    setattr(install, "install_from_fab", _leave_packed)  # noqa: B010


def _leave_packed(*_: object, **__: object) -> None:
    logger.info("the server's bundle stays packed; the installed application answers")


def _install_nothing(*_: object, **__: object) -> None:
    raise PinError("the server's dependencies are never installed here")


def _installed_instead(*_: object, **__: object) -> Callable[..., Application]:
    return lambda *_, **__: guarded(_installed)


def _installed(message: Message, context: Context) -> Message:
    from client.app import app  # here, so that a failing import is guarded as well

    return app(message, context)


def guarded(app: Application) -> Application:
    """Wrap ``app`` so that no text of an exception leaves it, neither in a reply nor in a log.

    The log of the hospital gets the exception's type and place. Its message stays out, since a
    library may have put a piece of a note into it.
    """

    def answer(message: Message, context: Context) -> Message:
        try:
            return app(message, context)
        except Exception as error:  # whatever it is, its text must not travel
            logger.error("the application failed: %s", failure_site(error))
        raise ClientFailure("the hospital's application failed; its own log says where")

    return answer


def _names_in(code: CodeType) -> set[str]:
    """Names that ``code`` and the functions inside it refer to."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


# What Flower's message loop calls to get at an application, and what it calls instead.
_REPLACED: dict[str, Callable[..., object]] = {
    "install_from_fab": _leave_packed,
    "install_app_dependencies": _install_nothing,
    "get_load_client_app_fn": _installed_instead,
}


if __name__ == "__main__":
    main()
