"""The `.plan/` folder: what was measured and simulated, written atomically, found again by name.

.plan/profiles/<model>[-s<tokens>]-<device>.json      .plan/plans/<plan>.toml
.plan/simulation.json                                 .plan/runs/<number>-<plan>/outcome.json
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from planner.basis.errors import ARTEFACT, USAGE, PlanError, unknown
from planner.basis.files import unwritable, write
from planner.search.answer import Answer, Found
from planner.search.cost import Terms
from planner.search.ranking import Ranking
from planner.search.space import Space
from planner.values import plan_file
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.plan import Plan
from planner.values.profile import Profile, ProfileKey, decode

T = TypeVar("T")
FOLDER = ".plan"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A measured run with the prediction it is held against. `partial` when it was interrupted or failed.

    `asked` are the commands that simulate and run the same again. `cluster` is what it was predicted for where that is
    not the profile's machine: a rehearsal.
    """

    profile: str
    predicted: Outcome
    measured: Outcome
    partial: bool = False
    asked: str = ""
    cluster: Cluster | None = None


class Catalogue(Protocol):
    """Profiles that come with the program: the module `profiles.shipped`, which the commands hand over."""

    def profiles(self) -> dict[str, Path]:
        """The files by name."""

    def read(self, path: Path) -> Profile:
        """Build a profile from one of these files, or from a person's own in the same format."""


def is_table(path: Path) -> bool:
    """Whether a profile is a table of somebody else's measurements: it has no model file and cannot be run."""
    return path.suffix == ".csv"


class Searched(msgspec.Struct, frozen=True, kw_only=True):
    """A search as it stands: what was asked, and everything that has been evaluated."""

    question: str
    profile: str
    cluster: Cluster
    space: Space
    objective: str
    terms: Terms
    stale: bool
    answer: Answer
    done: dict[str, Found]


def no_length(model: str, sequence: int, *, where: Path, why: str, fix: str, code: int = USAGE) -> PlanError:
    """The error of a model that was not profiled with sequences of so many tokens."""
    what = f"there is no profile of {model} with sequences of {sequence} tokens"
    return PlanError(what=what, where=str(where), why=why, fix=fix, code=code)


class _Keyed(msgspec.Struct):
    """What is read of a profile to find it."""

    key: ProfileKey
    model_path: str = ""


class Store:
    """The artefacts below one folder, and beside them the profiles of a catalogue, where there is one."""

    def __init__(self, root: Path | None = None, *, catalogue: Catalogue | None = None) -> None:
        self.root = root or Path(FOLDER)
        self.catalogue = catalogue

    def check_writable(self) -> None:
        """Raise `PlanError` (exit 4) now rather than after minutes of measuring."""
        probe = self.root / ".writable"
        write(probe, b"")
        probe.unlink(missing_ok=True)

    def save_profile(self, profile: Profile) -> Path:
        """Save a profile under its model and device; it becomes the one that `plan simulate` uses."""
        device = "".join(c if c.isalnum() else "-" for c in profile.key.device).strip("-")
        stem = profile.key.model.removesuffix(".py").replace(":", "-").replace(".py", "")
        stem += f"-s{profile.sequence}" if profile.sequence else ""
        path = self.root / "profiles" / f"{stem}-{device}.json"
        if self._is_of_another(path, profile):
            folder = Path(profile.model_path.partition(":")[0]).resolve().parent.name
            path = self.root / "profiles" / f"{folder}-{stem}-{device}.json"
        write(path, msgspec.json.format(msgspec.json.encode(profile), indent=1))
        return path

    def _is_of_another(self, path: Path, profile: Profile) -> bool:
        """Whether a profile is kept at a path that is of a model file of the same name in another folder."""
        try:
            kept = msgspec.json.decode(path.read_bytes(), type=_Keyed).model_path
        except (OSError, msgspec.DecodeError):
            return False
        return bool(kept) and Path(kept).resolve() != Path(profile.model_path).resolve()

    def profile_path(self, given: str | None) -> Path:
        """Return the path of a profile: as given, by its name in the store or the catalogue, or the one written last.

        Raises `PlanError` (exit 4) when there is none.
        """
        folder = self.root / "profiles"
        known = sorted(folder.glob("*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name)) if folder.is_dir() else []
        if given is None:
            if not known:
                raise PlanError(
                    what="there is no profile yet",
                    where=str(folder),
                    why="plans are simulated from measured layers",
                    fix="plan profile model.py   (plan init writes a model.py)",
                    code=ARTEFACT,
                )
            return known[-1]
        if Path(given).is_file():
            return Path(given)
        for path in known:
            if given in (path.stem, path.name):
                return path
        shipped = self.catalogue.profiles() if self.catalogue else {}
        if given in shipped:
            return shipped[given]
        names = [*(path.stem for path in known), *shipped]
        raise unknown("profile", given, names, where="--profile", fix="plan profile model.py", code=ARTEFACT)

    def of_length(self, path: Path, key: ProfileKey, sequence: int, fix: str) -> Path:
        """Return the profile beside one at `path` that differs from it in the length of its sequences alone.

        Raises `PlanError` (exit 4) with the lengths that there are, or what differs else, and that `fix`.
        """
        wanted = msgspec.structs.replace(key, sequence=sequence)
        found = {path: key}
        for other in sorted(path.parent.glob("*.json")) if path.suffix == ".json" else ():
            try:
                found[other] = msgspec.json.decode(self._read(other), type=_Keyed).key
            except msgspec.DecodeError:
                continue  # a damaged file is of no length
        for other, own in found.items():
            if own == wanted:
                return other
        same = (key.model, key.device, key.dtype)
        alike = [own for own in found.values() if (own.model, own.device, own.dtype) == same]
        known = ", ".join(map(str, sorted({own.sequence for own in alike if own.sequence != sequence}))) or "none"
        stale = next((own for own in alike if own.sequence == sequence), None)
        why = f"it is stale: {'; '.join(stale.differences(wanted))}" if stale else f"there are profiles of {known}"
        why += "; what a layer costs is measured at every length, as attention does not grow in proportion"
        raise no_length(key.model, sequence, where=path.parent, why=why, fix=fix, code=ARTEFACT)

    def name_of(self, path: Path) -> str:
        """Return what `profile_path` finds a profile by again: its name where it is kept, else its path."""
        known = (
            path.parent == self.root / "profiles"
            or path in (self.catalogue.profiles() if self.catalogue else {}).values()
        )
        return path.stem if known else str(path)

    def load_profile(self, path: Path) -> Profile:
        """Read a profile, measured (JSON) or of the catalogue (CSV). Raises `PlanError` (exit 4) when it is damaged."""
        if self.catalogue and is_table(path):
            return self.catalogue.read(path)
        return decode(self._read(path), str(path))

    def save_ranking(self, ranking: Ranking) -> None:
        """Save a simulation, and each of its plans as a file that can be edited and run."""
        for outcome in ranking.outcomes:
            write(self.root / "plans" / f"{outcome.plan}.toml", plan_file.to_toml(outcome.plan).encode())
        write(self.root / "simulation.json", msgspec.json.encode(ranking))

    def load_ranking(self) -> Ranking:
        """Read the last simulation. Raises `PlanError` (exit 4) when there is none or it is damaged."""
        path = self.root / "simulation.json"
        if not path.exists():
            raise PlanError(
                what="there is no simulation yet",
                where=str(path),
                why="'best' and the names of plans come from the last simulation",
                fix="plan simulate --k 2 --m 8",
                code=ARTEFACT,
            )
        return self._decode(path, Ranking, "simulation", "plan simulate --k 2 --m 8")

    def save_search(self, searched: Searched) -> None:
        """Save how far a search has come; it can be taken up again."""
        write(self.root / "search.json", msgspec.json.encode(searched))

    def load_search(self) -> Searched:
        """Read the last search. Raises `PlanError` (exit 4) when there is none or it is damaged."""
        path = self.root / "search.json"
        if not path.exists():
            raise PlanError(
                what="there is no search yet",
                where=str(path),
                why="plans are explained from what a search has evaluated",
                fix="plan search",
                code=ARTEFACT,
            )
        return self._decode(path, Searched, "search", "plan search")

    def plan(self, reference: str, able: Callable[[Plan], bool]) -> Plan:
        """Return the plan that is meant: `best`, a name of the last simulation, or the path of a plan file.

        The best is the best of those that are `able` to be run, where there are any.
        Raises `PlanError` with the nearest name (exit 2), or exit 3 when nothing fits.
        """
        if reference.endswith(".toml") or os.sep in reference:
            return plan_file.read(Path(reference))
        ranking = self.load_ranking()
        if reference == "best":
            return ranking.runnable(able).plan
        by_name = {str(outcome.plan): outcome.plan for outcome in ranking.outcomes}
        if reference not in by_name:
            fix = "plan simulate --k 2 --m 8   (then run one of the plans it names)"
            raise unknown("plan", reference, ["best", *by_name], where="the last simulation", fix=fix)
        return by_name[reference]

    def new_run(self, plan: Plan) -> Path:
        """Make and return the folder of a new run."""
        folder = self.root / "runs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(p.name.partition("-")[0]) for p in folder.iterdir() if p.name.partition("-")[0].isdigit()]
            for number in itertools.count(max(numbers, default=0) + 1):
                path = folder / f"{number:04d}-{plan}"
                with contextlib.suppress(FileExistsError):  # of a run that began meanwhile
                    path.mkdir()
                    break
        except OSError as error:
            raise unwritable(folder, error) from error
        return path

    def begun_run(self, reference: str) -> Path:
        """Return the folder of a run, finished or not, by its name or path, or of the `last` one.

        Raises `PlanError` with the nearest name (exit 4).
        """
        folder = self.root / "runs"
        known = sorted(p.parent for p in folder.glob("*/job.json")) if folder.is_dir() else []
        given = Path(reference)
        if (given / "job.json").is_file():
            return given
        if reference == "last" and known:
            return known[-1]
        for path in known:
            if path.name == reference:
                return path
        names = ["last", *(path.name for path in known)] if known else []
        raise unknown("run", reference, names, where=str(folder), fix="plan run best", code=ARTEFACT)

    def save_run(self, folder: Path, run: Run) -> None:
        """Save what a run measured."""
        write(folder / "outcome.json", msgspec.json.encode(run))

    def load_run(self, reference: str | None = None) -> tuple[Path, Run]:
        """Return a run by the name of its folder, or the last one. Raises `PlanError` (exit 4) when there is none."""
        folder = self.root / "runs"
        known = sorted(p.parent for p in folder.glob("*/outcome.json")) if folder.is_dir() else []
        if not known:
            raise PlanError(
                what="there is no finished run yet",
                where=str(folder),
                why="a report shows a run",
                fix="plan run best",
                code=ARTEFACT,
            )
        chosen = known[-1] if reference is None else next((p for p in known if reference in (p.name, str(p))), None)
        if chosen is None:
            names = [p.name for p in known]
            raise unknown("run", str(reference), names, where=str(folder), fix="plan run best", code=ARTEFACT)
        return chosen, self._decode(chosen / "outcome.json", Run, "run", "plan run best")

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise PlanError(
                what="a file cannot be read",
                where=str(path),
                why=error.strerror or str(error),
                fix="plan profile model.py",
                code=ARTEFACT,
            ) from error

    def _decode(self, path: Path, kind: type[T], name: str, fix: str) -> T:
        try:
            return msgspec.json.decode(self._read(path), type=kind)
        except (msgspec.DecodeError, ValueError) as error:
            raise PlanError(
                what=f"the {name} cannot be read",
                where=str(path),
                why=str(error),
                fix=fix,
                code=ARTEFACT,
            ) from error
