"""`python -m lasp doctor` and `python -m lasp verify`, alone or under torchrun, mpirun or srun."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    """Run the named command; its exit code is this program's."""
    parser = argparse.ArgumentParser(prog="python -m lasp", description="Tools of the lasp runtime.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="check in a minute whether this machine and these ranks work")
    told = "compare a model split over ranks with the whole: exit code 0 if equal"
    more = ". Both run with the model's hooks, of forward and of backward; what these keep or write stays."
    verify = commands.add_parser("verify", help=told, description=told.capitalize() + more)
    for command in (doctor, verify):
        command.add_argument("--backend", choices=["nccl", "gloo"], help="default: nccl where there is a GPU")
        command.add_argument("--timeout", type=float, default=60.0, help="seconds until a silent rank is an error")
    _add_options(verify)
    arguments = parser.parse_args()

    if arguments.command == "verify":
        return _verify(verify, arguments)
    from lasp.doctor import run_doctor

    return run_doctor(backend=arguments.backend, timeout=arguments.timeout)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _add_options(verify: argparse.ArgumentParser) -> None:
    what = verify.add_mutually_exclusive_group()
    what.add_argument("function", nargs="?", metavar="module:function", help="what makes a model, without an argument")
    what.add_argument("--model", choices=["tiny", "385M", "1B", "7B"], help="a TNL of this size; default: tiny")
    verify.add_argument("--layers", type=_positive, help="take only so many blocks of the model")
    verify.add_argument("--sp", type=_positive, help="ranks that share a sequence; default: all, or as many GPUs, or 2")
    verify.add_argument(
        "--tokens", type=_positive, help="length of the random sequences; default: 101 a rank and one more"
    )
    dtypes = ["float64", "float32", "bfloat16", "float16"]
    verify.add_argument("--dtype", choices=dtypes, help="of the arithmetic; default: as the model is")


def _verify(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from lasp import verify_command

    try:
        if arguments.function is None:
            build = verify_command.tnl(arguments.model or "tiny", arguments.layers)
            arguments.layers = None
        else:
            build = verify_command.load(arguments.function)
    except ValueError as error:
        parser.error(str(error))
    names = ("sp", "layers", "tokens", "dtype", "backend", "timeout")
    return verify_command.run_verify(build, **{name: getattr(arguments, name) for name in names})


if __name__ == "__main__":
    sys.exit(main())
