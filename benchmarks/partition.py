"""Cuts of the network between real nodes: python -m benchmarks.partition [--cut-s 30] [--times 10]

Root and iproute2 are needed: each node is in a network namespace. Printed: of five nodes cut 3|2, with the coordinator on
either side, how long until the three certify the next version and until the two say that they wait; then, of four nodes with
updates of 10 MB over 200 Mbit/s, how long the next certificate takes when one is cut off in mid-aggregation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from tests.namespaces.hosts import missing
from tests.namespaces.partition import cut_three_two, drop_in_transfer


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def cut(cut_s: float, *, coordinator_with_two: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="p2pcoord-cut-") as folder:
        seen = cut_three_two(Path(folder), cut_s, coordinator_with_two=coordinator_with_two)
    side = "two" if coordinator_with_two else "three"
    print(f"\n3|2 for {cut_s:g} s, the coordinator with the {side}; {load()}")
    print(f"  five voters after          {seen.grown_s:6.1f} s")
    print(
        f"  the three certify after    {seen.going_on_s:6.1f} s, {seen.majority_commits} versions in the cut"
    )
    print(
        f"  the two certify            {len(seen.minority_commits):6} versions; they say so after {seen.told_s:.1f} s:"
    )
    print(f"                             {seen.human[0] if seen.human else '-'}")
    print(f"  all five contribute again  {seen.healed_s:6.1f} s after healing")
    one = "one lineage" if len(set(seen.lineages)) == 1 else "SEVERAL LINEAGES"
    well = sum(code == 0 for code, _ in seen.verified)
    print(f"  {one}; verify is content with {well} of {len(seen.verified)} directories", flush=True)


def dropped(times: int) -> None:
    with tempfile.TemporaryDirectory(prefix="p2pcoord-drop-") as folder:
        found = drop_in_transfer(Path(folder), times)
    print(f"\na member cut off in mid-aggregation, 10 MB updates, {times} times; {load()}")
    for name, values in (
        ("to the next certificate, s", [seen.certificate_s for seen in found]),
        ("back in after healing, s", [seen.back_s for seen in found]),
    ):
        shown = "  ".join(f"{value:.1f}" for value in values)
        print(f"  {name:28} median {statistics.median(values):.1f}, worst {max(values):.1f}  ({shown})")
    named = sum(seen.named for seen in found)
    print(
        f"  commits that name the cut-off member: {named}; contributors: {[seen.without for seen in found]}"
    )
    for seen in found:
        print(
            f"  {seen.without} contributors after {seen.certificate_s:.1f} s; left out: {', '.join(seen.losses) or 'nobody'}"
        )
    print(f"  commits that are told wrongly: {len(found[-1].untrue)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cut-s", type=float, default=30.0)
    parser.add_argument("--times", type=int, default=10)
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    for coordinator_with_two in (False, True):
        cut(arguments.cut_s, coordinator_with_two=coordinator_with_two)
    dropped(arguments.times)


if __name__ == "__main__":
    main()
