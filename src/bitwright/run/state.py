"""What an unfinished run leaves to go on from: only success and ``--force`` end it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bitwright._version import __version__
from bitwright.errors import UsageError
from bitwright.run.files import is_partial, remove, sweep, write_json, write_text

ABOUT, IDENTITY = "run.json", "identity"
"""The command with its settings; the checksum of all that the checkpoints depend on."""


def is_unfinished(state: Path) -> bool:
    """Whether there is something to go on from."""
    return state.is_dir() and any(p.name not in {ABOUT, IDENTITY} and not is_partial(p) for p in state.iterdir())


def begin(state: Path, command: str, settings: dict[str, Any], *, resume: bool) -> None:
    """Makes the folder ready, once the arguments are known to be right.

    Args:
        state: the folder; what another run left in it goes, unless ``resume``.
        command: that people repeat.
        settings: that must be the same to go on, as JSON holds them.
        resume: go on with what is there.

    Raises:
        UsageError: what is there was made with other settings; it stays.
    """
    if resume and is_unfinished(state):
        _check_same(state, settings)
        sweep(state)
        return
    remove(state)
    write_json(state / ABOUT, {"command": command, "settings": settings, "bitwright": __version__})


def claim(state: Path, identity: str) -> None:
    """Makes sure that the checkpoints are of the run with this identity.

    Raises:
        UsageError: they are not; they stay.
    """
    from bitwright import together

    if not together.is_first():
        return
    path, digest = state / IDENTITY, hashlib.sha256(identity.encode()).hexdigest()
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace").strip() != digest:
        raise other_settings(state)
    write_text(path, digest + "\n")


def leave(state: Path) -> bool:
    """Takes away what is of no use to go on from; whether something is kept."""
    if is_unfinished(state):
        return True
    remove(state)
    return False


def other_settings(state: Path, what: str = "") -> UsageError:
    """The line for a run that cannot go on there."""
    about = _about(state)
    if about and about.get("bitwright") != __version__:
        return UsageError(
            f"The unfinished run in this folder was begun by {_version(about)}, and this is {__version__}, which "
            f"cannot go on with it. Finish it with that version{which_run(state)}, or use force=True without --resume "
            "to begin again."
        )
    detail = f" ({what})" if what else ""
    return UsageError(
        f"The unfinished run in this folder had other settings{detail}. Repeat its command{which_run(state)}, or use "
        "force=True without --resume to begin again."
    )


def _version(about: dict[str, Any]) -> str:
    known = about.get("bitwright")
    return f"bitwright {known}" if isinstance(known, str) else "an older bitwright"


def which_run(state: Path) -> str:
    """Which run it is, for a line; empty if that is not known."""
    command = _about(state).get("command")
    return f" ({command})" if isinstance(command, str) else ""


def _check_same(state: Path, settings: dict[str, Any]) -> None:
    before = _about(state).get("settings")
    now = json.loads(json.dumps(settings))
    if isinstance(before, dict):
        changed = next((k for k in now if before.get(k) != now[k]), None)
        if changed is not None:
            raise other_settings(state, _change(changed, before.get(changed), now[changed]))


def _change(name: str, before: Any, now: Any) -> str:
    """What differs; of settings that hold others, the first of those.

    Example:
        >>> _change("seed", 0, 1), _change("scheme", {"weights": 4}, {"weights": 5})
        ('seed: 0, now 1', 'weights: 4, now 5')
    """
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(k for k in (*now, *before) if before.get(k) != now.get(k))
        return _change(inner, before.get(inner), now.get(inner))
    short = [text if len(text) <= 40 else f"{text[:37]}..." for text in map(str, (before, now))]
    return f"{name}: {short[0]}, now {short[1]}"


def _about(state: Path) -> dict[str, Any]:
    try:
        found = json.loads((state / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
