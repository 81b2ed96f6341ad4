"""Simulated hospitals: FHIR R4 bulk exports with different case mixes, reproducible from a seed.

Promises:

- the same (clinosim version, profile, population, seed) gives the same bytes, on any day;
- no patient is in two hospitals, nor in the public cohort, and no two patients share an id;
- a folder in the cache is complete or absent: it is made aside, and renamed when finished.

From here on a simulated hospital is an ordinary FHIR export, read by the reader of a real one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from simulation.clinosim_export import MANIFEST
from simulation.profiles import PUBLIC, Profile, commands, profile

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # name of the hospital just finished, done, of how many

AT_ONCE = 2  # processes; each keeps one core busy
_LAYOUT = 1  # raise when the same order would give other files
_ROOT = Path(__file__).resolve().parent.parent
_MAX_HOSPITALS = 100
_MIN_POPULATION = 20


class SimulationError(RuntimeError):
    """clinosim is missing or failed; the message is one line and names the log."""


@dataclass(frozen=True)
class SimulatedHospital:
    """A hospital's export, and the counts in it.

    Parameters
    ----------
    export
        Folder of NDJSON files and ``manifest.json``.
    patients, notes
        Patient resources; DocumentReference and Composition resources.
    """

    name: str
    about: str
    export: Path
    patients: int
    notes: int


@dataclass(frozen=True)
class Order:
    """What to simulate: a profile, the inhabitants of its catchment, and the seed of the run."""

    profile: Profile
    population: int
    seed: int


def simulate_hospitals(
    count: int,
    population: int,
    seed: int,
    cache: Path,
    progress: Progress | None = None,
) -> list[SimulatedHospital]:
    """Simulate ``count`` hospitals (1 to 100), each with a catchment of ``population``.

    Raises
    ------
    ValueError
        ``count`` or ``population`` is out of range.
    SimulationError
        See ``simulate``.
    """
    return simulate(hospital_orders(count, population, seed), cache, progress)


def public_cohort(
    population: int, seed: int, cache: Path, progress: Progress | None = None
) -> SimulatedHospital:
    """Simulate patients of no hospital, the source of the instruction set.

    A coordinator has no hospital's records, so what it aligns with must never come from them.
    """
    return simulate([public_order(population, seed)], cache, progress)[0]


def hospital_orders(count: int, population: int, seed: int) -> list[Order]:
    """The orders of ``simulate_hospitals``; ordered with the public cohort's, both run at once."""
    if not 1 <= count <= _MAX_HOSPITALS:
        raise ValueError(f"hospitals: {count} asked for, 1 to {_MAX_HOSPITALS} can be simulated")
    _check_population(population)
    return [Order(profile(index), population, seed) for index in range(count)]


def public_order(population: int, seed: int) -> Order:
    """The order of ``public_cohort``."""
    _check_population(population)
    return Order(PUBLIC, population, seed)


def _check_population(population: int) -> None:
    if population < _MIN_POPULATION:
        raise ValueError(f"population: {population} is too small, use at least {_MIN_POPULATION}")


def simulate(
    orders: Sequence[Order], cache: Path, progress: Progress | None = None
) -> list[SimulatedHospital]:
    """Carry out ``orders``, in their order, taking from ``cache`` what it holds complete.

    Parameters
    ----------
    cache
        Folder for the exports and for clinosim's output (``NAME.log``); made if absent.
    progress
        Called after each hospital with its name, how many are done, and how many there are.

    Raises
    ------
    SimulationError
        clinosim is not installed, or one of its runs failed. The other run is stopped; finished
        hospitals stay in the cache.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folders = [cache.resolve() / _key(order) for order in orders]
    done = 0

    def finished(order: Order) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(order.profile.name, done, len(orders))

    missing: deque[tuple[Order, Path]] = deque()
    for order, folder in zip(orders, folders, strict=True):
        if _is_complete(folder):
            finished(order)
        else:
            missing.append((order, folder))
    running: list[_Run] = []
    try:
        while missing or running:
            while missing and len(running) < AT_ONCE:
                running.append(_Run(*missing.popleft()))
            time.sleep(0.05)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                run.settle()
                finished(run.order)
    finally:
        for run in running:
            run.abandon()
    return [_hospital(order, folder) for order, folder in zip(orders, folders, strict=True)]


class _Run:
    """One export being made in a process of its own, aside from where it will stand."""

    def __init__(self, order: Order, folder: Path) -> None:
        self.order = order
        self.folder = folder
        self.log = folder.with_suffix(".log")
        self.aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        config = Path(str(files("clinosim"))) / "config"
        lines = commands(order.profile, order.population, order.seed, config)
        paper = self.aside / "order.json"
        paper.write_text(
            json.dumps({"name": order.profile.name, "commands": lines}), encoding="utf-8"
        )
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "simulation.clinosim_export"),
                    *(str(paper), str(self.aside / "export")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=self.aside,
                env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
            )

    def settle(self) -> None:
        """Put the finished export in its place, or say that there is none."""
        try:
            if self.process.returncode != 0:
                raise SimulationError(
                    f"clinosim failed for hospital {self.order.profile.name} "
                    f"(exit status {self.process.returncode}); its output is in {self.log}"
                )
            if _is_complete(self.folder):
                return  # another process was faster, with the same bytes
            if self.folder.exists():
                logger.warning("%s is damaged and is replaced", self.folder)
                shutil.rmtree(self.folder)
            (self.aside / "export").rename(self.folder)
        finally:
            shutil.rmtree(self.aside, ignore_errors=True)

    def abandon(self) -> None:
        """Stop the process and leave nothing behind but its log."""
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.aside, ignore_errors=True)


def _key(order: Order) -> str:
    """Folder name of an order: readable, and different wherever the bytes could differ."""
    try:
        generator = version("clinosim")
    except PackageNotFoundError:
        raise SimulationError(
            "clinosim is not installed; install it or point notes.path at an export"
        ) from None
    recipe = hashlib.sha256(f"{_LAYOUT} {generator} {order!r}".encode()).hexdigest()[:10]
    return f"{order.profile.name}-p{order.population}-s{order.seed}-{recipe}"


def _is_complete(folder: Path) -> bool:
    """True if ``folder`` holds every file of its manifest, unchanged."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["output"]
        return all(
            hashlib.sha256((folder / file["url"]).read_bytes()).hexdigest() == file["sha256"]
            for file in listed
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _hospital(order: Order, folder: Path) -> SimulatedHospital:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    count = {file["type"]: file["count"] for file in manifest["output"]}
    return SimulatedHospital(
        name=order.profile.name,
        about=order.profile.about,
        export=folder,
        patients=count["Patient"],
        notes=count["DocumentReference"] + count["Composition"],
    )
