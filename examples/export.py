"""Make one safetensors file of a checkpoint's weights, and JSON of which the model is built that they are of.

    python examples/export.py runs/mine weights.safetensors              # the newest checkpoint, or with --step 500

It writes weights.safetensors and weights.json, after it has checked all sums of the checkpoint. Then, elsewhere::

    import json, torch
    from pathlib import Path
    from safetensors.torch import load_file
    from lasp import models

    about = json.loads(Path("weights.json").read_text())
    with torch.device("meta"):
        model = getattr(models, about["model"])(getattr(models, about["model"] + "Config")(**about["config"]))
    model.load_state_dict(load_file("weights.safetensors"), assign=True)

The names are those of the model, and the numbers those that were trained, in fp32. It runs in one process, on the host,
and needs memory for the weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from _checkpoint import checkpoint_of, load_weights
from _files import FileError, NotWritten, replacing, write
from _model import model_of, of_run
from _report import RUN
from safetensors import SafetensorError
from safetensors.torch import save_file

import lasp


def main(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a run, such as runs/mine.")],
    out: Annotated[Path, typer.Argument(help="File to be written, such as weights.safetensors.")],
    step: Annotated[int | None, typer.Option(min=1, help="Steps done; default: those of the newest.")] = None,
) -> None:
    """Write the weights of a checkpoint as one file."""
    about = out.with_suffix(".json")
    if out.suffix != ".safetensors":
        raise typer.BadParameter(f"{out} must be named *.safetensors", param_hint="OUT")
    for path in (out, about):
        if path.exists():
            raise typer.BadParameter(f"{path} exists; name another file, or remove it", param_hint="OUT")
    lasp.init("gloo")  # of one process: checkpoints are read on all ranks
    try:
        folder = checkpoint_of(run, step)
        config, told = of_run(run / RUN)
        with torch.device("meta"):
            model = model_of(config)
        model.to_empty(device="cpu")  # all of it is read
        load_weights(folder, model)
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial:
            try:
                save_file(model.state_dict(), partial, {"format": "pt"})
            except SafetensorError as error:
                raise OSError(None, str(error)) from error
        of_model = {"model": type(model).__name__, "config": asdict(config)}
        record = {**of_model, "checkpoint": folder.name, "text": told["text"]}
        write(about, json.dumps(record, indent=1) + "\n")
    except (FileError, NotWritten, FloatingPointError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    numbers = sum(x.numel() for x in model.state_dict().values())
    typer.echo(f"{out}: {numbers:,} numbers of {folder}; {about} says of what model")


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
