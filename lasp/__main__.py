"""`python -m lasp doctor`, alone or under torchrun, mpirun or srun."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    """Run the named command; its exit code is this program's."""
    parser = argparse.ArgumentParser(prog="python -m lasp", description="Tools of the lasp runtime.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="check in a minute whether this machine and these ranks work")
    doctor.add_argument("--backend", choices=["nccl", "gloo"], help="default: nccl where there is a GPU")
    doctor.add_argument("--timeout", type=float, default=60.0, help="seconds after which a silent rank is an error")
    arguments = parser.parse_args()

    from lasp.doctor import run_doctor

    return run_doctor(backend=arguments.backend, timeout=arguments.timeout)


if __name__ == "__main__":
    sys.exit(main())
