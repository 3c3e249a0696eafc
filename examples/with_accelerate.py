"""A model of transformers in a loop of accelerate, its sequences split over ranks: accumulation, clipping.

torchrun --nproc-per-node 2 examples/with_accelerate.py
python examples/with_accelerate.py                         # one process: the same losses
"""

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import BambaConfig, BambaForCausalLM

import lasp

SEQUENCE_RANKS, ACCUMULATE = 2, 2

env = lasp.init()
sp = min(SEQUENCE_RANKS, env.world_size)
mesh = lasp.init_mesh(dp_shard=-1, sp=sp)
accelerator = Accelerator(cpu=env.device.type == "cpu", gradient_accumulation_steps=ACCUMULATE)

torch.manual_seed(0)  # the same weights on every rank
model = BambaForCausalLM(
    BambaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1, 3],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_expand=2,
    )
)
lasp.parallelize(model, mesh["sp"])
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))

texts = [torch.randint(64, (8,), generator=torch.Generator().manual_seed(n)).repeat(25)[: 180 + n] for n in range(16)]
loader = DataLoader([{"input_ids": text} for text in texts], batch_size=1)  # type: ignore[arg-type]
# Ranks of a sequence get the same samples: these are dealt by the place in data parallelism.
places = mesh["dp_shard"]
loader = prepare_data_loader(
    loader, accelerator.device, num_processes=places.size(), process_index=places.get_local_rank(), put_on_device=True
)

for epoch in range(3):
    for step, batch in enumerate(loader):
        local = lasp.shard_batch(batch, mesh)  # this rank's slice, its labels shifted before the cut
        with accelerator.accumulate(model):
            output = model(input_ids=local["input_ids"], layout=local["layout"])
            # The mean over the tokens of all ranks; accelerate divides it by the steps that it accumulates.
            loss, tokens = lasp.token_loss(output.logits, local["labels"], mesh=mesh)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0) if accelerator.sync_gradients else None
            optimizer.step()
            optimizer.zero_grad()
        if norm is not None and env.rank == 0:
            print(f"epoch {epoch}, step {step}: loss {loss.item():.6f}, gradient norm {norm.item():.6f}")
if env.rank == 0:
    print(f"norm of the weights {sum(p.double().pow(2).sum() for p in model.parameters()) ** 0.5:.6f}")
accelerator.end_training()
