"""The families of `lasp.models.mixers` on a GPU against fp64 on a CPU: run by hand, with PYTHONPATH=.:kernels.

Prints the relative difference of logits and of the worst gradient of all parameters, in fp32 and under bf16 autocast.
A rate of decay has one number a head, whose gradient is a sum over all tokens of what nearly cancels: three times as
far off as others may be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.models import Decoder, DecoderConfig
from lasp.models.mixers import MIXERS


def run(model: Decoder, ids: Tensor, *, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a cross entropy, in fp64 on the CPU."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits = model(ids)
    F.cross_entropy((logits.float() if autocast else logits).flatten(0, 1), ids.flatten()).backward()
    return logits.detach().double().cpu(), {n: p.grad.double().cpu() for n, p in model.named_parameters()}


def difference(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def main() -> None:
    for family in MIXERS:
        torch.manual_seed(0)
        exact = Decoder(DecoderConfig(family, 300, layers=2, width=128, heads=2, glu_width=192)).double()
        ids = torch.randint(300, (2, 517))
        logits, gradients = run(exact, ids, autocast=False)
        for autocast, bound in ((False, 1e-5), (True, 8e-2)):
            model = Decoder(exact.config).cuda()
            model.load_state_dict({name: x.float() for name, x in exact.state_dict().items()})
            found, found_gradients = run(model, ids.cuda(), autocast=autocast)
            worst = max(gradients, key=lambda n: difference(found_gradients[n], gradients[n]))
            off = difference(found, logits), difference(found_gradients[worst], gradients[worst])
            bound *= 3 if worst.endswith("log_rate") else 1
            print(f"{family}, {'bf16' if autocast else 'fp32'}: logits {off[0]:.1e}, gradient of {worst} {off[1]:.1e}")
            assert max(off) < bound, family


if __name__ == "__main__":
    main()
