"""What tests/test_verify_gpu.py runs on every rank: `lasp.verify` over NCCL, plain, compiled, in DDP and in FSDP2."""

import torch

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.models import TNL, LinearTransformer, LinearTransformerConfig, TNLConfig

env = lasp.init(timeout=60.0)
mesh = lasp.init_mesh(dp_shard=1, sp=-1)


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    config = {"layers": 2, "width": 128, "heads": 2}
    if kind is TNL:
        model = TNL(TNLConfig(97, glu_width=160, **config))
    else:
        model = LinearTransformer(LinearTransformerConfig(97, mlp_width=160, **config))
    return model.to(env.device, dtype)


def check(model, what, **options):
    random = torch.cuda.get_rng_state() if env.device.type == "cuda" else torch.get_rng_state()
    found = lasp.verify(model, mesh, **options)
    if env.rank == 0:
        print(f"{what}: {found}\n", flush=True)
    assert found.ok, what
    assert found.ranks == env.world_size
    assert torch.equal(random, torch.cuda.get_rng_state() if env.device.type == "cuda" else torch.get_rng_state())


for kind in (TNL, LinearTransformer):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = model_of(kind, dtype)
        check(model, f"{kind.__name__} {dtype}, before parallelize", tokens=700)
        lasp.parallelize(model, mesh)
        check(model, f"{kind.__name__} {dtype}, after parallelize", tokens=700)

compiled = lasp.parallelize(model_of(TNL), mesh)
for block in compiled.blocks:
    block.compile()
check(compiled, "compiled")
check(wrap_ddp(compiled, mesh), "compiled, in DDP")
sharded = lasp.parallelize(model_of(TNL), mesh)
check(wrap_fsdp2(sharded, mesh, blocks=sharded.blocks), "in FSDP2")

wrong = model_of(TNL)
wrong.blocks[1].attention.register_forward_pre_hook(lambda _, given: (given[0].roll(1, 1), *given[1:]))
found = lasp.verify(wrong, mesh, strict=False)  # else parallelize refuses it
assert not found.ok, found
torch.distributed.barrier()
print("passed", flush=True)
