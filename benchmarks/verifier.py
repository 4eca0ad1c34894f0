"""How many planted failures the checks of generated pictures find, and how many true pictures they send to review.

    OMP_NUM_THREADS=1 python -m benchmarks.verifier

On held-out renders. Limits may be chosen on the even ones (``--choose`` prints them); the tables are of the odd ones.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from packshot.config.verify import CHECKS
from packshot.generate.certificate import encode_png, measure
from packshot.generate.checks import Shown, run_checks
from tools.planted import KINDS, OWN_CHECK, Case, open_cases

Measures = dict[str, float | None]
LEARNED = ("extension", "floating", "duplicate")  # kinds whose checks are small networks


def measures_of(case: Case) -> Measures:
    """What every check measures of a picture, by its code."""
    measured = measure(encode_png(case.picture_HW3), case.canvas)
    checks = run_checks(Shown(case.picture_HW3, case.canvas, measured))
    values: Measures = {}
    for code, check in checks.items():
        values[code] = check["measured"]
    return values


def failing(values: Measures) -> set[str]:
    """The codes of the checks that fail."""
    return {code for code, value in values.items() if not CHECKS[code].passes(value)}


def collect(renders: str, half: int, count: int) -> tuple[list[Measures], dict[str, list[Measures]], float]:
    """Measures of the true pictures of one half, those of ``count`` planted failures of each kind, and the seconds
    that a picture took. half: 0 the even rows, 1 the odd ones."""
    true: list[Measures] = []
    planted: dict[str, list[Measures]] = {kind: [] for kind in KINDS}
    cases = [(number, case) for number, case in open_cases(renders) if number % 2 == half]
    started = time.process_time()
    for _, case in cases:
        true.append(measures_of(case))
    seconds = (time.process_time() - started) / len(cases)
    chosen = np.unique(np.linspace(0, len(cases) - 1, min(count, len(cases))).astype(int))
    for index in chosen:
        number, case = cases[index]
        for kind, plant in KINDS.items():
            planted[kind].append(measures_of(plant(case, np.random.default_rng(number))))
    return true, planted, seconds


def suggest(true: list[Measures], share: float) -> None:
    """Print the limit of each check that sends at most a share of the true pictures to review."""
    for code in OWN_CHECK.values():
        row = CHECKS[code]
        values = [measured[code] for measured in true]
        known = np.array([value for value in values if value is not None])
        limit = np.quantile(known, share if row.below else 1 - share)
        print(f"{code}: {limit:.4f} (now {row.limit:g}), of {len(known)} true pictures")


def report(true: list[Measures], planted: dict[str, list[Measures]]) -> None:
    """Print both tables."""
    print("| planted | its check | found by it | found by any check |\n|---|---|---|---|")
    for kind, several in planted.items():
        found = [failing(values) for values in several]
        own = sum(OWN_CHECK[kind] in codes for codes in found)
        some = sum(map(bool, found))
        share = f"{own} of {len(found)} ({own / len(found):.0%})"
        print(f"| {kind} | `{OWN_CHECK[kind]}` | {share} | {some / len(found):.0%} |")
    alarms = [failing(values) for values in true]
    print("\n| check | true pictures sent to review |\n|---|---|")
    for code in CHECKS:
        wrong = sum(code in codes for codes in alarms)
        print(f"| `{code}` | {wrong} of {len(true)} ({wrong / len(true):.1%}) |")
    some = sum(map(bool, alarms))
    print(f"| any of them | {some} of {len(true)} ({some / len(true):.1%}) |")


def known(several: list[Measures], code: str) -> np.ndarray:
    """The measures of a check where it is defined, so that larger is worse."""
    sign = -1.0 if CHECKS[code].below else 1.0
    return np.array([sign * value for value in (values[code] for values in several) if value is not None])


def curve(true: list[Measures], planted: dict[str, list[Measures]]) -> None:
    """Print what a limit would find at several rates of false alarms on these very pictures."""
    print("\n| planted | found at 1 % of false alarms | 2 % | 5 % | 10 % |\n|---|---|---|---|---|")
    for kind in ("extension", "floating", "duplicate", "text"):
        code = OWN_CHECK[kind]
        limits = np.quantile(known(true, code), (0.99, 0.98, 0.95, 0.9))
        found = [f"{(known(planted[kind], code) > limit).mean():.0%}" for limit in limits]
        print(f"| {kind} | {' | '.join(found)} |")


def together(true: list[Measures], planted: dict[str, list[Measures]]) -> None:
    """Print the alarms of all checks, if each check by probability sends a share of these very pictures to review."""
    codes = [OWN_CHECK[kind] for kind in LEARNED]
    others = [bool(failing(values) - set(codes)) for values in true]
    print(f"\n| each of them | any alarm | {' | '.join(LEARNED)} |\n|---|---|{'---|' * len(LEARNED)}")
    for share in (0.005, 0.01, 0.02, 0.03):
        alarms = np.array(others)
        found = []
        for kind, code in zip(LEARNED, codes, strict=True):
            values = np.array([-np.inf if row[code] is None else row[code] for row in true], float)
            limit = np.quantile(known(true, code), 1 - share)
            alarms |= values > limit
            found.append(f"{(known(planted[kind], code) > limit).sum() / len(planted[kind]):.1%}")
        print(f"| {share:.1%} | {alarms.mean():.1%} | {' | '.join(found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", default="data/rendered/heldout")
    parser.add_argument("--count", type=int, default=30, help="planted failures of each kind")
    parser.add_argument("--choose", type=float, help="print limits for this share of false alarms, on the even rows")
    args = parser.parse_args()
    if args.choose is not None:
        true, planted, _ = collect(args.renders, 0, args.count)
        suggest(true, args.choose)
        report(true, planted)
        curve(true, planted)
        together(true, planted)
        return
    true, planted, seconds = collect(args.renders, 1, args.count)
    report(true, planted)
    curve(true, planted)
    together(true, planted)
    print(f"\n{seconds:.2f} CPU seconds a picture")


if __name__ == "__main__":
    main()
