"""What was measured on this very machine: where it is stored, and the process of its own in which it is measured.

A backend that was built for other cards may be wrong, hang or crash. So it never runs first where it could harm the
caller: `child` runs in a process of its own, which this module starts, watches and stops. The choice is stored in the
user's cache, in a file named after all that it depends on, and from then on it is only read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import queue
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from eap_kernels import _native
from eap_kernels._schemas import OPERATORS

# What is measured on each type of device. A CPU has a measured rule for the rest, and a GPU takes the reference.
ARITHMETICS = {"cuda": ("bfloat16", "float32", "tf32", "float16"), "cpu": ("bfloat16",)}
# The child must begin with its next step within this time, and another process be done with all of them.
STEP_SECONDS, LOCK_SECONDS = 60.0, 900.0
# The child imports what this process imports, ends when it ends, and only its own words go to the pipe.
START = """
import json, os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
pipe = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.path[:] = json.loads(sys.argv[1])
from eap_kernels.tune import child
child.run(json.loads(sys.argv[2]), pipe)
"""

# {"date": ..., "verified": {op: [impl]}, "failed": {op: {impl: reason}}, "seconds": {op: {case: {size: {impl: s}}}}}
Found = dict[str, Any]
# By device and arithmetic, once in a process; None where nothing could be measured.
_known: dict[str, dict[str, Found | None]] = {}
_one_at_a_time = threading.RLock()


class Unable(Exception):
    """Nothing can be measured now, through no fault of a backend."""


def cache_folder() -> Path:
    """Where this project keeps files: $EAP_CACHE, or eap-circuits in the user's cache folder."""
    if os.environ.get("EAP_CACHE"):
        return Path(os.environ["EAP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "eap-circuits"


@functools.cache
def processor() -> str:
    """The processor's name if the system tells it, else its architecture."""
    listed = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", listed.read_text() if listed.is_file() else "", re.MULTILINE)
    return names[0] if names else platform.machine()


def instruction_set() -> str:
    """What the CPU's kernels use, by which processors of one name differ; torch's word where there are no kernels."""
    build = _native.build_info()
    return build.instruction_set() if build else torch.backends.cpu.get_cpu_capability()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


@functools.cache
def key(kind: str, name: str) -> dict[str, str]:
    """All that a choice depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"device": name, "torch": torch.__version__, "sources": _digest()}
    if kind == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        found["driver"] = driver.read_text().splitlines()[0] if driver.is_file() else _driver()
        try:
            found["triton"] = version("triton")
        except PackageNotFoundError:
            found["triton"] = "none"
    else:
        found["instruction_set"] = instruction_set()
    return found


def _driver() -> str:
    asked = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(asked()) if asked else "unknown"


def _digest() -> str:
    """Of the compiled library and all our Python sources, Triton's among them."""
    home, found = Path(__file__).parent.parent, hashlib.sha256()
    for file in sorted([*home.rglob("*.py"), *home.glob("_C*")]):
        found.update(file.relative_to(home).as_posix().encode() + file.read_bytes())
    return found.hexdigest()


def path(device: torch.device) -> Path:
    text = json.dumps(key(device.type, name_of(device)), sort_keys=True)
    return cache_folder() / f"{device.type}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def known(device: torch.device, arithmetic: str) -> Found | None:
    """What was measured on this device in this arithmetic. On a GPU it is measured now, if it may be."""
    at = _of(device)
    if arithmetic in at:
        return at[arithmetic]
    if device.type != "cuda" or arithmetic not in ARITHMETICS["cuda"] or not allowed():
        return None
    with _one_at_a_time:
        if arithmetic not in at:
            at[arithmetic] = _first_use(device, arithmetic)
        return at[arithmetic]


def _of(device: torch.device) -> dict[str, Found | None]:
    name = name_of(device) if device.type == "cuda" else device.type
    if name not in _known:
        _known[name] = {**stored(device)}
    return _known[name]


def allowed() -> bool:
    """Whether a call may start measuring: a choice must not change between runs, and a capture must not wait."""
    return (
        os.environ.get("EAP_TUNE") != "0"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _first_use(device: torch.device, arithmetic: str) -> Found | None:
    print(
        f"eap_kernels: measuring its kernels on {name_of(device)} in {arithmetic}, once, for about a minute "
        f"(EAP_TUNE=0 does without; docs/ops/auto.md)",
        file=sys.stderr,
        flush=True,
    )
    try:
        return measured(device, arithmetic)
    except Unable as error:
        warnings.warn(
            f"eap_kernels could not measure its kernels on {name_of(device)} ({error}), so `auto` may be slow. "
            "`python -m eap_kernels.tune` measures them when the device is free.",
            stacklevel=2,
        )
        return None


def stored(device: torch.device) -> dict[str, Found]:
    """What was measured on this device, by arithmetic."""
    with contextlib.suppress(OSError):  # a folder that may not be looked into
        if device.type != "cpu" or any(cache_folder().glob("cpu-*.json")):  # the key is not made for nothing
            return _read(path(device))
    return {}


def _read(file: Path) -> dict[str, Found]:
    try:
        content = json.loads(file.read_bytes())
        # What is read of it later is read here, too: what cannot be read raises.
        for found in content["found"].values():
            list(ranks(found))
            found["date"], [by.items() for by in found["failed"].values()], [*map(list, found["verified"].values())]
        return dict(content["found"])
    except OSError:
        return {}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        warnings.warn(
            f"{file}: expected measured choices, found something else; they are measured again.", stacklevel=2
        )
        return {}


def ranks(found: Found) -> Iterator[tuple[str, str, int, list[str]]]:
    """(operator, case, size, backends, the fastest first) of all that was measured."""
    for op, cases in found["seconds"].items():
        for case, sizes in cases.items():
            for size, seconds in sizes.items():
                # + 0.0: words would be sorted, too.
                yield op, case, int(size), sorted(seconds, key=lambda impl: seconds[impl] + 0.0)


def measured(device: torch.device, arithmetic: str, again: bool = False) -> Found:
    """Measure, under a lock, and store the result; or take what another process has stored meanwhile.

    Raises:
        Unable: nothing can be measured, or not be stored.
    """
    from filelock import FileLock, Timeout

    file, stale = path(device), True
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
            found = None if again else _read(file).get(arithmetic)
            stale = found is None
            if found is None:
                found = _measure(device, arithmetic)
                _write(file, {"key": key(device.type, name_of(device)), "found": {**_read(file), arithmetic: found}})
    except Timeout:
        raise Unable(f"another process holds {file}.lock") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unable(f"{file.parent} cannot be written: {reason}; EAP_CACHE names another folder") from error
    _of(device)[arithmetic] = found
    if stale:
        _say_failures(device, arithmetic, found)
    return found


def _write(file: Path, content: dict[str, Any]) -> None:
    spare = file.with_name(f".{secrets.token_hex(8)}.json")
    try:
        spare.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(spare, file)
    finally:
        spare.unlink(missing_ok=True)


def _measure(device: torch.device, arithmetic: str) -> Found:
    """Start children until one is done; each leaves out the backends at which an earlier one failed."""
    found: Found = {"date": date.today().isoformat(), "verified": {}, "failed": {}, "seconds": {}}
    while failure := _child({"device": str(device), "arithmetic": arithmetic, **found}, found):
        op, impl, reason = failure
        if impl in (None, "reference"):
            raise Unable(reason)
        for each in OPERATORS if op is None else (op,):
            found["failed"].setdefault(each, {})[impl] = reason
            for sizes in found["seconds"].get(each, {}).values():
                for seconds in sizes.values():
                    seconds.pop(impl, None)
    return found


def _say_failures(device: torch.device, arithmetic: str, found: Found) -> None:
    of: dict[tuple[str, str], list[str]] = {}
    for op, failed in found["failed"].items():
        for failure in failed.items():
            of.setdefault(failure, []).append(op)
    if of:
        said = "; ".join(f"{impl} for {', '.join(ops)}: {why}" for (impl, why), ops in of.items())
        warnings.warn(
            f"eap_kernels: on {name_of(device)}, in {arithmetic}, `auto` leaves out {said}. Please report this with "
            "what `python -m eap_kernels.info` prints.",
            stacklevel=2,
        )


def _child(request: dict[str, Any], found: Found) -> tuple[str | None, str | None, str] | None:
    """Run one child and add what it finds. If it fails: the operator, or None for all; the backend, or None for
    nobody; and the reason."""
    lines: queue.Queue[str | None] = queue.Queue()
    at: tuple[str | None, str | None] = (None, None)
    command = [sys.executable, "-c", START, json.dumps([*map(str, sys.path)]), json.dumps(request)]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            raise Unable(f"{sys.executable} cannot be started: {error.strerror}") from error

        def read() -> None:
            assert process.stdout is not None
            with process.stdout as pipe:
                for line in pipe:
                    lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while line := lines.get(timeout=STEP_SECONDS):
                what, *rest = json.loads(line)
                if what == "done":
                    return None
                if what == "trying":
                    at = rest[0], rest[1]
                elif what == "verified":
                    found["verified"].setdefault(rest[0], []).append(rest[1])
                elif what == "seconds":
                    op, case, size, seconds = rest
                    found["seconds"].setdefault(op, {}).setdefault(case, {})[str(size)] = seconds
                elif what == "wrong":
                    return (*at, rest[0])
                else:
                    return None, None, rest[0]
            status = process.wait(STEP_SECONDS)
            errors.seek(0)
            last = ([line for line in errors.read().splitlines() if line.strip()] or ["it said nothing"])[-1].strip()
            return (*at, f"{_ended(status)} ({last[:200]})")
        except (queue.Empty, subprocess.TimeoutExpired):
            return (*at, f"no end after {STEP_SECONDS:g} s")
        finally:
            _stop(process)


def _ended(status: int) -> str:
    with contextlib.suppress(ValueError):
        return f"the process ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def _stop(process: subprocess.Popen[str]) -> None:
    """Kill a process and what it started. One that waits for a hung kernel may take its time."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)
    if process.stdin is not None:
        process.stdin.close()
