"""Run the jobs of recipes/findings.yaml, or write docs/findings.md from the committed results.

python -m experiments run [--only 10] [--jobs NAME ...] [--max-minutes 60] [--keep] [--list]
python -m experiments page
"""

from __future__ import annotations

import argparse
import sys

from experiments.jobs import ROOT, read_queue
from experiments.page import pages
from experiments.queue import listing, run
from proper.files import write_text


def main() -> int:
    """Parse the command line and run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the jobs that are not done")
    runs.add_argument("--only", type=int, nargs="+", default=[], metavar="N", help="only the jobs of these questions")
    runs.add_argument("--jobs", nargs="+", default=[], metavar="NAME", help="only these jobs, in the queue's order")
    runs.add_argument("--max-minutes", type=float, metavar="M", help="start no job that would end later than this")
    runs.add_argument("--keep", action="store_true", help="count a result of other code as done")
    runs.add_argument("--list", action="store_true", help="list the jobs with their state and run nothing")
    commands.add_parser("page", help="write docs/findings.md and its figures from the committed results")
    arguments = parser.parse_args()
    if arguments.command == "page":
        for path, text in pages(ROOT / "docs" / "results").items():
            write_text(ROOT / "docs" / path, text)
        return 0
    by_name = {job.name: job for job in read_queue()}
    if unknown := sorted(set(arguments.jobs) - set(by_name)):
        parser.error(f"--jobs: no such job: {', '.join(unknown)}")
    only, names = set(arguments.only), set(arguments.jobs) or set(by_name)
    chosen = [job for job in by_name.values() if job.name in names and (not only or only & set(job.questions))]
    if arguments.list:
        print(listing(chosen, by_name, keep=arguments.keep))
        return 0
    return run(chosen, by_name, arguments.max_minutes, keep=arguments.keep)


if __name__ == "__main__":
    sys.exit(main())
